"""What the normal operations must give, worked out by torch for a whole group in one process.

Loops over tokens and ranks, sums in float64: made to be checked by eye, not to be fast. Shares no
code with the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RankTokens:
    """What one rank dispatches: x [T, H], topk_idx, topk_weights [T, K], scales [T, G] or None."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpectedLayout:
    """int32 [R], int32 [E], bool [T, R]."""

    tokens_per_rank: torch.Tensor
    tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass(frozen=True)
class ExpectedRows:
    """What one rank receives, by source rank, then token. source: (rank, token) of each row."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    recv_counts: torch.Tensor
    source: list[tuple[int, int]]


def layout(topk_idx: torch.Tensor, num_ranks: int, num_experts: int) -> ExpectedLayout:
    """Entries outside 0 .. num_experts - 1 name no expert."""
    local = num_experts // num_ranks
    per_rank = torch.zeros(num_ranks, dtype=torch.int32)
    per_expert = torch.zeros(num_experts, dtype=torch.int32)
    goes = torch.zeros(topk_idx.shape[0], num_ranks, dtype=torch.bool)
    for token, row in enumerate(topk_idx):
        experts = [int(e) for e in row if 0 <= int(e) < num_experts]
        for expert in experts:
            per_expert[expert] += 1
            goes[token, expert // local] = True
        for rank in {expert // local for expert in experts}:
            per_rank[rank] += 1
    return ExpectedLayout(per_rank, per_expert, goes)


def rank_prefix(inputs: Sequence[RankTokens], num_experts: int) -> torch.Tensor:
    """int32 [R, R]: [s, d] is the number of tokens from ranks 0 .. s to rank d."""
    ranks = len(inputs)
    counts = [layout(one.topk_idx, ranks, num_experts).tokens_per_rank for one in inputs]
    return torch.stack(counts).cumsum(0).to(torch.int32)


def dispatch(
    inputs: Sequence[RankTokens], num_experts: int, alignment: int = 1
) -> list[ExpectedRows]:
    """What every rank receives."""
    ranks = len(inputs)
    goes = [layout(one.topk_idx, ranks, num_experts).is_token_in_rank for one in inputs]
    return [
        _received(inputs, [table[:, rank] for table in goes], rank, num_experts, alignment)
        for rank in range(ranks)
    ]


def _received(
    inputs: Sequence[RankTokens],
    goes: Sequence[torch.Tensor],
    rank: int,
    num_experts: int,
    alignment: int,
) -> ExpectedRows:
    local = num_experts // len(inputs)
    source = [
        (sender, token)
        for sender, one in enumerate(inputs)
        for token in range(one.x.shape[0])
        if goes[sender][token]
    ]
    first = inputs[0]
    topk = first.topk_idx.shape[1]
    x = torch.empty((len(source), first.x.shape[1]), dtype=first.x.dtype)
    scales = None
    if first.scales is not None:
        scales = torch.empty((len(source), *first.scales.shape[1:]), dtype=first.scales.dtype)
    idx = torch.full((len(source), topk), -1, dtype=torch.int64)
    weights = torch.zeros((len(source), topk), dtype=torch.float32)
    counts = torch.zeros(local, dtype=torch.int64)
    for row, (sender, token) in enumerate(source):
        one = inputs[sender]
        x[row] = one.x[token]
        if scales is not None and one.scales is not None:
            scales[row] = one.scales[token]
        for k in range(topk):
            expert = int(one.topk_idx[token, k]) - rank * local
            if 0 <= expert < local:
                idx[row, k] = expert
                weights[row, k] = one.topk_weights[token, k]
                counts[expert] += 1
    aligned = (counts + alignment - 1) // alignment * alignment
    return ExpectedRows(x, scales, idx, weights, aligned.to(torch.int32), source)


def combine(
    rows: Sequence[torch.Tensor],
    sources: Sequence[Sequence[tuple[int, int]]],
    num_tokens: Sequence[int],
    bias: Sequence[Sequence[torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """float64 [T, H] of every rank: bias + the sum over ranks of the rows that came of its tokens.

    rows[d]: [N, C] of rank d in the order of sources[d]. Serves top-k weights as well (C = K).
    """
    width = rows[0].shape[1]
    out = [torch.zeros((tokens, width), dtype=torch.float64) for tokens in num_tokens]
    for rank, biases in enumerate(bias or []):
        for one in biases:
            out[rank] += one.double()
    for rank, source in enumerate(sources):
        for row, (sender, token) in enumerate(source):
            out[sender][token] += rows[rank][row].double()
    return out
