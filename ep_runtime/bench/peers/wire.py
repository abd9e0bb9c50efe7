"""A row of a collective: values | scales | experts | weights, as bytes, and views of its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.bench.routing import Inputs
from ep_runtime.bench.traffic import row_bytes
from ep_runtime.reference import SCALE_GROUP, quantize_fp8

ROW_ALIGNMENT = 16
ENTRY_BYTES = 4


@dataclass(frozen=True, slots=True)
class Wire:
    """Sizes of a packed row. Empty rows carry expert -1 everywhere."""

    hidden: int
    topk: int
    dispatch_format: str
    alignment: int = ROW_ALIGNMENT

    @property
    def fp8(self) -> bool:
        return self.dispatch_format == "fp8"

    @property
    def row_bytes(self) -> int:
        """Of a packed row, a multiple of `alignment`, which is one of 16."""
        entries = 2 * ENTRY_BYTES * self.topk
        unpadded = row_bytes(self.dispatch_format, self.hidden) + entries
        return -(-unpadded // self.alignment) * self.alignment

    def empty_rows(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """uint8 [num_rows, row_bytes] of empty rows."""
        rows = torch.zeros(num_rows, self.row_bytes, dtype=torch.uint8, device=device)
        self.views(rows).topk_idx.fill_(-1)
        return rows

    def views(self, rows: torch.Tensor) -> RowViews:
        """The parts of uint8 rows [N, row_bytes], sharing their memory."""
        value_bytes = self.hidden if self.fp8 else 2 * self.hidden
        scale_bytes = 4 * self.hidden // SCALE_GROUP if self.fp8 else 0
        ends = [value_bytes, value_bytes + scale_bytes]
        ends += [ends[-1] + ENTRY_BYTES * self.topk, ends[-1] + 2 * ENTRY_BYTES * self.topk]
        return RowViews(
            rows[:, : ends[0]].view(torch.float8_e4m3fn if self.fp8 else torch.bfloat16),
            rows[:, ends[0] : ends[1]].view(torch.float32) if self.fp8 else None,
            rows[:, ends[1] : ends[2]].view(torch.int32),
            rows[:, ends[2] : ends[3]].view(torch.float32),
        )


@dataclass(frozen=True, slots=True)
class RowViews:
    """values [N, H], scales [N, H/128] float32 or None, topk_idx [N, K] int32 (global experts),
    topk_weights [N, K] float32."""

    values: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def pack_rows(wire: Wire, rows: torch.Tensor, inputs: Inputs, slots: torch.Tensor) -> None:
    """Write token t into every row `slots[t, j]` that is not -1: the plain form of the kernel.

    Experts go as int32. Not for timing.
    """
    views = wire.views(rows)
    token, place = (slots >= 0).nonzero(as_tuple=True)
    row = slots[token, place].long()
    if views.scales is None:
        views.values[row] = inputs.x[token]
    else:
        values, scales = quantize_fp8(inputs.x)
        # Bytes: not every backend can index float8.
        views.values.view(torch.uint8)[row] = values.view(torch.uint8)[token]
        views.scales[row] = scales[token]
    views.topk_idx[row] = inputs.topk_idx[token].int()
    views.topk_weights[row] = inputs.topk_weights[token]


def slots_by_rank(
    topk_idx: torch.Tensor, num_ranks: int, num_local: int, starts: list[int]
) -> torch.Tensor:
    """slots [T, R] int32: where token t lies among the rows for rank d, or -1.

    Rows for rank d begin at `starts[d]` and follow the order of tokens.
    """
    owners = torch.arange(num_ranks, device=topk_idx.device).view(1, 1, -1)
    chosen = ((topk_idx // num_local).unsqueeze(-1) == owners) & (topk_idx >= 0).unsqueeze(-1)
    goes = chosen.any(dim=1)
    offset = torch.tensor(starts, device=topk_idx.device).view(1, -1)
    place = goes.long().cumsum(dim=0) - 1 + offset
    return torch.where(goes, place, -1).int()
