"""The kernels in plain torch, for CPU ranks: reads counts on the host, so it cannot be captured.

`examples.experts.parts.Kernels` says what each function does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ep_runtime.reference import SCALE_GROUP
from examples.experts.parts import ROW_TILE, ExpertWeights, Groups

path = "torch, on the CPU"


def gate_up(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    groups: Groups,
    weights: ExpertWeights,
    h: torch.Tensor,
) -> None:
    """Expert by expert; the counts are read on the host."""
    for expert, slots in _slots(groups):
        rows = slots if groups.pairs is None else groups.pairs[slots].long() // groups.topk
        values = _gather(x, rows)
        if scales is not None:
            values = values * scales[rows].repeat_interleave(SCALE_GROUP, dim=-1)
        gate, up = values @ weights.gate[expert].float().T, values @ weights.up[expert].float().T
        h[slots] = (F.silu(gate) * up).bfloat16()


def down(h: torch.Tensor, groups: Groups, weights: ExpertWeights, y: torch.Tensor) -> None:
    """Expert by expert."""
    for expert, slots in _slots(groups):
        y[slots] = (h[slots].float() @ weights.down[expert].float().T).bfloat16()


def down_weighted(
    h: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    terms: torch.Tensor,
) -> None:
    """Expert by expert; rows go to their pairs."""
    assert groups.pairs is not None
    for expert, slots in _slots(groups):
        pairs = groups.pairs[slots].long()
        rows = h[slots].float() @ weights.down[expert].float().T
        terms[pairs] = rows * topk_weights.flatten()[pairs].unsqueeze(-1)


def sort(
    topk_idx: torch.Tensor,
    count: torch.Tensor,
    first: torch.Tensor,
    cursor: torch.Tensor,
    pairs: torch.Tensor,
) -> None:
    """In the order of pairs."""
    tiles = (count + ROW_TILE - 1) // ROW_TILE
    first[0] = 0
    first[1:] = (tiles * ROW_TILE).cumsum(0)
    cursor.copy_(first[:-1])
    flat = topk_idx.flatten()
    for expert, start in enumerate(first[:-1].tolist()):
        mine = (flat == expert).nonzero()[:, 0]
        pairs[start : start + len(mine)] = mine.int()


def sum_terms(
    terms: torch.Tensor, topk_idx: torch.Tensor, num_messages: torch.Tensor, y: torch.Tensor
) -> None:
    """All messages at once; terms of other ranks' experts are left out, whatever they hold."""
    rows, topk = int(num_messages.sum()), topk_idx.shape[1]
    here = (topk_idx[:rows] >= 0).unsqueeze(-1)
    mine = terms[: rows * topk].view(rows, topk, terms.shape[1])
    total = torch.zeros(rows, terms.shape[1])
    for k in range(topk):
        total += torch.where(here[:, k], mine[:, k], 0.0)
    y[:rows] = total.bfloat16()


def _slots(groups: Groups) -> Iterator[tuple[int, torch.Tensor]]:
    """Every expert that has rows, and its slots."""
    starts, counts = groups.first[:-1].tolist(), groups.count.tolist()
    for expert, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            yield expert, torch.arange(start, start + count)


def _gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32; through bytes, because torch cannot index FP8 on every backend."""
    if x.dtype == torch.bfloat16:
        return x[rows].float()
    return x.view(torch.uint8)[rows].view(x.dtype).float()
