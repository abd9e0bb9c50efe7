"""Receive memory of one dispatch, and the tensors over it."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch

from ep_runtime.native import _C
from ep_runtime.normal.handles import NormalHandle, NormalReceived
from ep_runtime.normal.heap import DataHeap
from ep_runtime.normal.ops import Routes
from ep_runtime.normal.pool import Block, Uses
from ep_runtime.normal.validate import Outgoing


@dataclass(frozen=True, slots=True)
class Target:
    """Where a dispatch receives: chosen before it, made into tensors behind it.

    heap    the memory is a part of it
    offset  of the memory in the heap: what this rank tells its peers
    rows    that there is room for
    parts   bytes from the beginning of the memory to its arrays
    block   of the pool, which the tensors will own: the rows one part of it, the others the rest;
            None: the staging block
    copied  the next dispatch needs the staging block: the tensors must be copies

    As a context: what raises within gives the memory back.
    """

    heap: DataHeap
    offset: int
    rows: int
    parts: dict[str, int]
    block: Block | None
    copied: bool

    @classmethod
    def in_pool(
        cls,
        heap: DataHeap,
        rows: Outgoing,
        routes: Routes,
        num_rows: int,
        *,
        capturing: bool,
        limit: int | None = None,
    ) -> Target | None:
        """A block that the tensors own; None where the pool has no room, or it takes more bytes
        than `limit`."""
        parts = _parts(rows, routes, num_rows)
        if limit is not None and parts["bytes"] > limit:
            return None
        block = heap.pool.allocate(parts["bytes"], capturing=capturing)
        if block is None:
            return None
        return cls(heap, block.offset, num_rows, parts, block, False)

    @classmethod
    def staging(
        cls, heap: DataHeap, rows: Outgoing, routes: Routes, num_rows: int, *, copied: bool = True
    ) -> Target:
        """The block that every dispatch may use in its turn."""
        return cls(heap, 0, num_rows, _parts(rows, routes, num_rows), None, copied)

    @property
    def uses(self) -> Uses:
        """To wait for before anybody writes."""
        return {} if self.block is None else self.block.uses

    def drop(self) -> None:
        """Nothing was received."""
        if self.block is not None:
            self.heap.give_back(self.block)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.drop()

    def received(
        self,
        rows: Outgoing,
        routes: Routes,
        handle: NormalHandle,
        per_expert: list[int],
        counts: torch.Tensor | None,
    ) -> NormalReceived:
        """The tensors, which are copied on the dispatch's stream if they must: each by itself, so
        that each has memory of its own. Called behind the dispatch: the GPU need not wait for this.
        """
        n, at = handle.num_rows, self.parts
        described, memory, device = self._memory(n * rows.row_bytes)

        def over(
            memory: torch.UntypedStorage, start: int, dtype: torch.dtype, *shape: int
        ) -> torch.Tensor:
            # One step instead of a slice and two views, for each of five tensors.
            empty = torch.empty(0, dtype=dtype, device=device)
            rows_apart = (*shape[1:], 1)  # of one or two dimensions
            made = empty.set_(memory, start // dtype.itemsize, shape, rows_apart)
            return made.clone() if self.copied else made

        def part(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return over(described, at[name], dtype, *shape)

        scales = None
        if rows.scales is not None:
            shape = (n, rows.num_scales)[: rows.scales.dim()]
            scales = part("scales", rows.scales.dtype, *shape)
        has_idx, has_weights = routes.topk_idx is not None, routes.topk_weights is not None
        table = (n, routes.topk)
        return NormalReceived(
            over(memory, 0, rows.x.dtype, n, rows.x.shape[1]),
            scales,
            part("topk_idx", torch.int64, *table) if has_idx else None,
            part("topk_weights", torch.float32, *table) if has_weights else None,
            part("source_token", torch.int32, n),
            per_expert,
            counts,
            handle,
        )

    def _memory(
        self, num_bytes: int
    ) -> tuple[torch.UntypedStorage, torch.UntypedStorage, torch.device]:
        """(what describes rows, the rows in so many bytes, where they are): each goes back with the
        last tensor over it. A handle or routes that are kept for long keep no rows.

        Where fewer rows come than there is room for, the rest goes back now: peers write only rows
        that they announced, so nothing of it was touched.
        """
        heap, start, block = self.heap, self.parts["x"], self.block
        behind = None if block is None else heap.pool.divide(block, start, num_bytes)
        described = heap.view(self.offset, start, block)
        if num_bytes:
            rows = heap.view(self.offset + start, num_bytes, behind)
        else:  # there may be no heap behind the block
            rows = torch.empty(0, dtype=torch.uint8, device=described.device)
        return described.untyped_storage(), rows.untyped_storage(), described.device


def _parts(rows: Outgoing, routes: Routes, num_rows: int) -> dict[str, int]:
    return _C.normal_block(num_rows, rows.row_bytes, rows.num_scales, routes.topk)
