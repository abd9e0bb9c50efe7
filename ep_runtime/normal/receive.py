"""Receive memory of one dispatch, and the tensors over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.native import _C
from ep_runtime.normal.handles import NormalHandle, NormalReceived
from ep_runtime.normal.heap import DataHeap
from ep_runtime.normal.ops import Routes
from ep_runtime.normal.pool import Uses
from ep_runtime.normal.validate import Outgoing


@dataclass(frozen=True, slots=True)
class Target:
    """Where a dispatch receives.

    base    uint8 over the memory
    offset  of the memory in the data heap: what this rank tells its peers
    parts   bytes from the beginning of the memory to its arrays
    uses    to wait for before anybody writes
    staged  the next dispatch needs this memory: the tensors must be copies
    """

    base: torch.Tensor
    offset: int
    parts: dict[str, int]
    uses: Uses
    staged: bool

    @classmethod
    def in_pool(
        cls, heap: DataHeap, rows: Outgoing, routes: Routes, num_rows: int, *, capturing: bool
    ) -> Target | None:
        """A block that the tensors own; None where the pool has no room."""
        parts = _parts(rows, routes, num_rows)
        block = heap.pool.allocate(parts["bytes"], capturing=capturing)
        if block is None:
            return None
        base = heap.view(block.offset, parts["bytes"], block)
        return cls(base, block.offset, parts, block.uses, False)

    @classmethod
    def staging(cls, heap: DataHeap, rows: Outgoing, routes: Routes, num_rows: int) -> Target:
        """The block that every dispatch may use in its turn."""
        parts = _parts(rows, routes, num_rows)
        return cls(heap.view(0, parts["bytes"], None), 0, parts, {}, True)

    def received(
        self,
        rows: Outgoing,
        routes: Routes,
        handle: NormalHandle,
        per_expert: list[int],
        counts: torch.Tensor | None,
    ) -> NormalReceived:
        """The tensors. A staged block is copied behind its dispatch, on the same stream."""
        base = self.base.clone() if self.staged else self.base

        def part(start: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            end = start + dtype.itemsize * torch.Size(shape).numel()
            return base[start:end].view(dtype).view(shape)

        n, at = handle.num_rows, self.parts
        scales = None
        if rows.scales is not None:
            shape = (n, rows.num_scales)[: rows.scales.dim()]
            scales = part(at["scales"], rows.scales.dtype, *shape)
        has_idx, has_weights = routes.topk_idx is not None, routes.topk_weights is not None
        table = (n, routes.topk)
        return NormalReceived(
            part(0, rows.x.dtype, n, rows.x.shape[1]),
            scales,
            part(at["topk_idx"], torch.int64, *table) if has_idx else None,
            part(at["topk_weights"], torch.float32, *table) if has_weights else None,
            part(at["source_token"], torch.int32, n),
            per_expert,
            counts,
            handle,
        )


def _parts(rows: Outgoing, routes: Routes, num_rows: int) -> dict[str, int]:
    return _C.normal_block(num_rows, rows.row_bytes, rows.num_scales, routes.topk)
