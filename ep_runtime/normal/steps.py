"""The parts of an operation, in the words that NormalBuffer's methods are written in."""

from __future__ import annotations

import torch

from ep_runtime.errors import CaptureError, ShapeError
from ep_runtime.memory.base import log
from ep_runtime.normal.config import block_bytes
from ep_runtime.normal.counts import Counts
from ep_runtime.normal.growth import GrowingRank
from ep_runtime.normal.handles import Layout, NormalHandle, NormalReceived
from ep_runtime.normal.ops import Routes, Tables
from ep_runtime.normal.receive import Target
from ep_runtime.normal.validate import Outgoing


class NormalSteps(GrowingRank):
    """What dispatches have in common."""

    def _enter(self) -> None:
        """Take this operation's place in the sequence."""
        self._streams.enter()
        if self._streams.capturing():
            self._heap.captured = True
        elif self._retired and not self.virtual:
            self._free_retired()

    def _refuse_capture(self) -> None:
        if self._streams.capturing():
            raise CaptureError(
                "dispatch in exact mode waits on the host for the number of rows, which a capture"
                " cannot hold; pass num_worst_tokens (rows to receive at most, for example"
                f" {self.num_ranks * self.config.max_tokens}), or use dispatch_cached()"
            )

    def _prepare_worst(self, rows: Outgoing, routes: Routes, num_worst_tokens: int) -> None:
        """Room for a dispatch whose real size no host learns."""
        if routes.topk_idx is None:
            raise ShapeError(
                f"num_worst_tokens={num_worst_tokens} without topk_idx: only topk_idx tells which"
                " received rows are real; pass it, or use exact mode (num_worst_tokens=0)"
            )
        if rows.num_tokens > self.config.max_tokens:
            raise ShapeError(
                f"x has {rows.num_tokens} rows, max_tokens={self.config.max_tokens}; in worst-case"
                " mode dispatch fewer tokens at once, or call reserve(max_tokens=...) on every"
                " rank"
            )
        if not self.config.layered(self.num_ranks):  # else its rail and its node make room
            self._make_room(
                block_bytes(num_worst_tokens, rows.row_bytes, rows.num_scales, routes.topk), 0
            )

    def _routes(
        self,
        rows: Outgoing,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_experts: int | None,
        layout: Layout | None,
    ) -> tuple[int, Routes]:
        """(number of experts, what is sent beside the rows), all of it checked."""
        if num_experts is None:
            if layout is None:
                raise ShapeError("num_experts is not given; pass it, or the layout")
            num_experts = layout.tokens_per_expert.shape[0]
        self._check.experts(num_experts)
        if layout is not None:
            self._check.layout(layout, rows.num_tokens, num_experts)
        if topk_idx is None:
            if layout is None or topk_weights is not None:
                raise ShapeError(
                    "topk_idx is not given; pass it, or a layout (and no topk_weights) to send"
                    " rows alone"
                )
            return num_experts, Routes(None, None, 0)
        topk = self._check.routes(topk_idx, rows.num_tokens)
        if topk_weights is not None:
            self._check.weights(topk_weights, rows.num_tokens, topk)
        return num_experts, Routes(topk_idx, topk_weights, topk)

    def _layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        def ints(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device=self.device)

        goes = torch.empty(
            (topk_idx.shape[0], self.num_ranks), dtype=torch.bool, device=self.device
        )
        layout = Layout(ints(self.num_ranks), ints(num_experts), goes)
        self._ops.layout(topk_idx, num_experts, layout)
        return layout

    def _tables(self, num_tokens: int) -> Tables:
        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        return Tables(ints(self.num_ranks, self.num_ranks), ints(num_tokens, self.num_ranks))

    def _notify(
        self,
        rows: Outgoing,
        routes: Routes,
        layout: Layout,
        num_experts: int,
        alignment: int,
        num_worst_tokens: int,
        counts: torch.Tensor,
    ) -> tuple[NormalHandle, list[int]]:
        """Exchange counts. In exact mode learn them on the host, and make room for the rows."""
        exact = num_worst_tokens == 0
        tables = self._announce(rows.num_tokens, layout, num_experts, alignment, exact, counts)
        per_expert: list[int] = []
        num_rows = most_rows = num_worst_tokens
        inbox_rows = (self.num_ranks - 1) * self.config.max_tokens
        if exact:
            told = self._learn_counts(counts.shape[0])
            num_rows, per_expert = told.rows, told.per_expert
            most_rows, inbox_rows = told.most_rows, told.most_inbox
            size = block_bytes(most_rows, rows.row_bytes, rows.num_scales, routes.topk)
            self._make_room(size, 0)
        handle = NormalHandle(
            tables.rank_prefix,
            tables.send_position,
            layout.is_token_in_rank,
            rows.num_tokens,
            num_rows,
            most_rows,
            inbox_rows,
            num_experts,
            exact,
            self._identity,
        )
        return handle, per_expert

    def _announce(
        self,
        num_tokens: int,
        layout: Layout,
        num_experts: int,
        alignment: int,
        exact: bool,
        counts: torch.Tensor,
    ) -> Tables:
        """Exchange counts. In exact mode the host learns them from _learn_counts()."""
        tables = self._tables(num_tokens)
        words = self._host_counts.prepare() if exact else 0
        self._ops.notify(layout, num_tokens, num_experts, alignment, tables, counts, words)
        self._after()
        return tables

    def _learn_counts(self, local_experts: int) -> Counts:
        """The wait of the host."""
        return self._host_counts.wait(local_experts, self._budget_s, self._check_fatal)

    def _send(
        self,
        rows: Outgoing,
        routes: Routes,
        handle: NormalHandle,
        per_expert: list[int],
        counts: torch.Tensor | None,
        num_sms: int,
    ) -> NormalReceived:
        """Choose receive memory, send, and give the memory its tensors."""
        self.stats.dispatches += 1
        target = self._target(rows, routes, handle.num_rows)
        self._ops.dispatch(
            rows,
            routes,
            handle.num_experts,
            Tables(handle.rank_prefix, handle.send_position),
            target.offset,
            handle.num_rows,
            handle.exact,
            num_sms,
        )
        self._after()
        return target.received(rows, routes, handle, per_expert, counts)

    def _target(self, rows: Outgoing, routes: Routes, num_rows: int) -> Target:
        """A block of the pool, or the staging block where the pool has no room."""
        heap, capturing = self._heap, self._streams.capturing()
        target = Target.in_pool(heap, rows, routes, num_rows, capturing=capturing)
        if target is not None:
            self._streams.wait_for(target.uses)
            return target
        self.stats.copied_dispatches += 1
        if not self._copy_told:
            self._copy_told = True
            log.info(
                "rank %d: the pool (%d bytes, %d in use) has no room for %d received rows; they are"
                " copied. Drop received tensors earlier or raise pool_bytes",
                self.rank,
                heap.sizes.pool,
                heap.pool.in_use,
                num_rows,
            )
        return Target.staging(heap, rows, routes, num_rows)
