"""The parts of an operation, in the words that NormalBuffer's methods are written in."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ep_runtime.errors import CaptureError, ShapeError
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.normal.config import block_bytes
from ep_runtime.normal.counts import Counts
from ep_runtime.normal.growth import GrowingRank
from ep_runtime.normal.handles import Layout, NormalHandle, NormalReceived
from ep_runtime.normal.ops import Routes, Tables, block_size
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
        if layout is not None:
            num_experts = self._check.layout(layout, rows.num_tokens, num_experts)
        elif num_experts is None:
            raise ShapeError("num_experts is not given; pass it, or the layout")
        else:
            self._check.experts(num_experts)
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

    def _dispatch_worst(
        self,
        rows: Outgoing,
        routes: Routes,
        layout: Layout,
        num_experts: int,
        alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> NormalReceived:
        """A dispatch whose real size no host learns."""
        counts = self._counts(num_experts)
        tables = self._announce(rows.num_tokens, layout, num_experts, alignment, False, counts)
        inbox_rows = (self.num_ranks - 1) * self.config.max_tokens
        told = Counts(num_worst_tokens, num_worst_tokens, inbox_rows, [])
        handle = self._handle(rows, layout, tables, num_experts, told, exact=False)
        return self._send(rows, routes, handle, [], counts, num_sms)

    def _dispatch_exact(
        self,
        rows: Outgoing,
        routes: Routes,
        layout: Layout,
        num_experts: int,
        alignment: int,
        num_sms: int,
    ) -> NormalReceived:
        """A dispatch whose size the host learns: while the rows are sent, if it can."""
        counts = self._counts(num_experts)
        tables = self._announce(rows.num_tokens, layout, num_experts, alignment, True, counts)
        ahead = self._send_ahead(rows, routes, num_experts, tables, num_sms)
        with ahead or nullcontext():
            told = self._learn_counts(counts.shape[0])
        self._most_received = max(self._most_received, told.most_rows)
        handle = self._handle(rows, layout, tables, num_experts, told, exact=True)
        if ahead is not None and told.most_rows <= ahead.rows:
            self.stats.dispatches += 1
            return ahead.received(rows, routes, handle, told.per_expert, counts)
        if ahead is not None:
            ahead.drop()
        size = block_bytes(told.most_rows, rows.row_bytes, rows.num_scales, routes.topk)
        self._make_room(size, 0)
        return self._send(rows, routes, handle, told.per_expert, counts, num_sms)

    def _send_ahead(
        self, rows: Outgoing, routes: Routes, num_experts: int, tables: Tables, num_sms: int
    ) -> Target | None:
        """Send before the host knows how many rows come, into a block for the most that usually
        can, or that ever came. If more come to some rank, the kernels of all ranks see it and send
        nothing.

        None where this rank has no such block free, which is its own affair; and where heaps might
        have to grow for so many rows, which all ranks do or none.
        """
        most = max(self.num_ranks * self.config.max_tokens, self._most_received)
        limit = self._heap.sizes.staging
        target = Target.in_pool(self._heap, rows, routes, most, capturing=False, limit=limit)
        if target is not None:
            self._streams.wait_for(target.uses)
            self._launch(rows, routes, num_experts, tables, target, _C.BLOCK_AHEAD, num_sms)
        return target

    def _counts(self, num_experts: int) -> torch.Tensor:
        local = num_experts // self.num_ranks
        return torch.empty(local, dtype=torch.int32, device=self.device)

    def _handle(
        self,
        rows: Outgoing,
        layout: Layout,
        tables: Tables,
        num_experts: int,
        told: Counts,
        *,
        exact: bool,
    ) -> NormalHandle:
        return NormalHandle(
            tables.rank_prefix,
            tables.send_position,
            layout.is_token_in_rank,
            rows.num_tokens,
            told.rows,
            told.most_rows,
            told.most_inbox,
            num_experts,
            exact,
            self._identity,
        )

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
        tables = Tables(handle.rank_prefix, handle.send_position)
        size = block_size(handle.exact)
        self._launch(rows, routes, handle.num_experts, tables, target, size, num_sms)
        return target.received(rows, routes, handle, per_expert, counts)

    def _launch(
        self,
        rows: Outgoing,
        routes: Routes,
        num_experts: int,
        tables: Tables,
        target: Target,
        size: int,
        num_sms: int,
        source_token: torch.Tensor | None = None,
    ) -> None:
        """size: a BLOCK_ constant of _C."""
        with target:
            self._ops.dispatch(
                rows,
                routes,
                num_experts,
                tables,
                target.offset,
                target.rows,
                size,
                num_sms,
                source_token,
            )
            self._after()

    def _target(self, rows: Outgoing, routes: Routes, num_rows: int) -> Target:
        """A block of the pool, or the staging block where the pool has no room."""
        heap, capturing = self._heap, self._streams.capturing()
        target = Target.in_pool(heap, rows, routes, num_rows, capturing=capturing)
        if target is not None:
            self._streams.wait_for(target.uses)
            return target
        self.stats.copied_dispatches += 1
        if heap.sizes.pool and not self._copy_told:  # without a pool they were meant to be
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
