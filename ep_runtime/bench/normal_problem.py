"""One size of the normal benchmark: inputs, what they must become, and the bytes that takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.bench.routing import Inputs, Sizes, make_inputs
from ep_runtime.bench.traffic import (
    BF16_BYTES,
    Traffic,
    least_traffic,
    message_counts,
    row_bytes,
)
from ep_runtime.reference import quantize_fp8

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class NormalProblem:
    """This rank's rows on its device, and what it must receive.

    rows      [T, H] bf16, or (e4m3, scales)
    expected  the received rows' bytes, uint8 [N, row bytes]; scales float32 [N, H/128] or None
    copies    ranks that each of this rank's tokens goes to, int64 [T]
    counts    [R, R]: tokens from rank s to rank d
    """

    sizes: Sizes
    dispatch_format: str
    inputs: Inputs
    rows: Rows
    expected: torch.Tensor
    expected_scales: torch.Tensor | None
    copies: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def make(
        cls, sizes: Sizes, rank: int, dispatch_format: str, device: torch.device
    ) -> NormalProblem:
        """Draw the inputs of every rank; keep what this one sends and receives."""
        everyone = [make_inputs(sizes, other, 0) for other in range(sizes.num_ranks)]
        counts = message_counts([one.topk_idx for one in everyone], sizes.num_experts)
        local = sizes.num_experts // sizes.num_ranks
        parts, scale_parts = [], []
        for one in everyone:
            owners = torch.where(one.topk_idx >= 0, one.topk_idx // local, -1)
            here = (owners == rank).any(1)
            rows = _rows(one.x[here].to(device), dispatch_format)
            values = rows[0] if isinstance(rows, tuple) else rows
            parts.append(values.view(torch.uint8))
            if isinstance(rows, tuple):
                scale_parts.append(rows[1])
        mine = everyone[rank]
        owners = torch.where(mine.topk_idx >= 0, mine.topk_idx // local, -1)
        ranks = torch.arange(sizes.num_ranks)
        copies = (owners.unsqueeze(2) == ranks).any(1).sum(1)
        inputs = mine.to(device)
        return cls(
            sizes,
            dispatch_format,
            inputs,
            _rows(inputs.x, dispatch_format),
            torch.cat(parts),
            torch.cat(scale_parts) if scale_parts else None,
            copies.to(device),
            counts,
        )

    @property
    def traffic(self) -> Traffic:
        """The least that the link must carry."""
        return least_traffic(self.counts, self.dispatch_format, "bf16", self.sizes.hidden)

    def recv_bytes(self, op: str) -> float:
        """Rows received at the rank that receives most, times their bytes, both ways for a pair."""
        rows = int(self.counts.sum(0).max())
        out = rows * row_bytes(self.dispatch_format, self.sizes.hidden)
        back = rows * BF16_BYTES * self.sizes.hidden
        return {"combine": back, "pair": out + back}.get(op, out)

    def link_bytes(self, op: str) -> float:
        """Bytes through the busiest link."""
        return self.traffic.of("dispatch" if op == "dispatch_cached" else op)

    def wrong_rows(self, x: torch.Tensor, scales: torch.Tensor | None) -> str:
        """What is wrong with received rows; "" if nothing."""
        count = self.expected.shape[0]
        if not torch.equal(x[:count].contiguous().view(torch.uint8), self.expected):
            return "received rows differ from what was sent"
        if self.expected_scales is None:
            return ""
        same = scales is not None and torch.equal(scales[:count], self.expected_scales)
        return "" if same else "received scales differ from what was sent"

    def wrong_sum(self, out: torch.Tensor) -> str:
        """What is wrong with a combine of rows that every rank left as they were, in BF16.

        As many equal terms as copies: exact in FP32, so equal to the last bit.
        """
        sent = self.rows[0] if isinstance(self.rows, tuple) else self.rows
        wanted = (sent.bfloat16().float() * self.copies.unsqueeze(1)).bfloat16()
        return "" if torch.equal(out, wanted) else "combined rows differ from the sum"


def _rows(x: torch.Tensor, dispatch_format: str) -> Rows:
    if dispatch_format == "bf16":
        return x
    values, scales = quantize_fp8(x)
    return values, scales
