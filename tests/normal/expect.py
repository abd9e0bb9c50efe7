"""Random groups of tokens, and what it means that a result is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from programs import POISON, Rows
from support import random_rows

from ep_runtime.normal import reference
from ep_runtime.normal.reference import ExpectedRows, RankTokens


def below(rng: torch.Generator, end: int) -> int:
    return int(torch.randint(end, (), generator=rng))


def random_experts(rng: torch.Generator, num_ranks: int, topk: int) -> int:
    """A number of experts that the ranks share and that is at least topk."""
    return (-(-topk // num_ranks) + below(rng, 4)) * num_ranks


def random_tokens(
    rng: torch.Generator,
    rows: int,
    hidden: int,
    topk: int,
    num_experts: int,
    *,
    scales: str | None = None,
    idle: float = 0.1,
) -> RankTokens:
    """scales: None for bf16 rows, "float32", "int32" or "flat" for e4m3 rows with such scales."""
    order = torch.rand((rows, num_experts), generator=rng).argsort(dim=1)
    idx = order[:, :topk].contiguous()
    idx[torch.rand(idx.shape, generator=rng) < 0.15] = -1
    idx[torch.rand((rows,), generator=rng) < idle] = -1
    if below(rng, 2):
        idx = idx.int()
    weights = torch.rand((rows, topk), generator=rng) * 2 - 0.5
    if scales is None:
        return RankTokens(random_rows(rng, rows, hidden), idx, weights)
    x = torch.randn((rows, hidden), generator=rng).to(torch.float8_e4m3fn)
    groups = -(-hidden // 128)
    if scales == "int32":
        words = torch.randint(-(2**31), 2**31, (rows, groups), generator=rng).int()
        return RankTokens(x, idx, weights, words)
    shape = (rows,) if scales == "flat" else (rows, groups)
    return RankTokens(x, idx, weights, torch.rand(shape, generator=rng))


def random_group(
    rng: torch.Generator,
    num_ranks: int,
    hidden: int,
    topk: int,
    num_experts: int,
    most: int,
    *,
    scales: str | None = None,
) -> list[RankTokens]:
    """Tokens of every rank: uneven counts, zero and `most` more often than chance has it."""
    choices = [0, most, 1, below(rng, most + 1), below(rng, most + 1)]
    return [
        random_tokens(rng, choices[below(rng, 5)], hidden, topk, num_experts, scales=scales)
        for _ in range(num_ranks)
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_received(
    got: Sequence[Rows],
    inputs: Sequence[RankTokens],
    num_experts: int,
    *,
    alignment: int = 1,
    worst: int = 0,
    topk: bool = True,
    routed: Sequence[RankTokens] | None = None,
) -> list[ExpectedRows]:
    """Every rank received exactly the expected bits; in worst-case mode nothing behind them.

    routed  the group whose routing was used, where a cached dispatch sent other rows
    """
    expected = reference.dispatch(inputs, num_experts, alignment)
    prefix = reference.rank_prefix(inputs if routed is None else routed, num_experts)
    for rank, (mine, right) in enumerate(zip(got, expected, strict=True)):
        where = f"rank {rank}"
        count = len(right.source)
        rows = worst or count
        assert mine.x.shape == (rows, inputs[rank].x.shape[1]), where
        assert mine.x.dtype == inputs[rank].x.dtype, where
        assert torch.equal(bits(mine.x[:count]), bits(right.x)), f"{where}: x"
        assert (bits(mine.x[count:]) == POISON).all(), f"{where}: rows that nobody sent"
        assert (mine.scales is None) == (right.scales is None), where
        if mine.scales is not None and right.scales is not None:
            assert mine.scales.dtype == right.scales.dtype
            assert mine.scales.shape[1:] == right.scales.shape[1:]
            assert torch.equal(bits(mine.scales[:count]), bits(right.scales)), f"{where}: scales"
        tokens = [token for _, token in right.source]
        assert [int(t) for t in mine.source_token[:count]] == tokens, f"{where}: source_token"
        assert torch.equal(mine.rank_prefix, prefix), f"{where}: rank_prefix"
        if topk:
            _check_topk(where, mine, right, count, worst > 0)
    return expected


def _check_topk(where: str, mine: Rows, right: ExpectedRows, count: int, worst: bool) -> None:
    assert mine.topk_idx is not None
    assert torch.equal(mine.topk_idx[:count], right.topk_idx), f"{where}: topk_idx"
    assert (mine.topk_idx[count:] == -1).all(), f"{where}: padding of topk_idx"
    if mine.topk_weights is not None:
        assert torch.equal(mine.topk_weights[:count], right.topk_weights), f"{where}: weights"
        assert (mine.topk_weights[count:] == 0).all(), f"{where}: padding of weights"
    assert mine.recv_counts is not None
    assert torch.equal(mine.recv_counts, right.recv_counts), f"{where}: recv_counts"
    wanted = [] if worst else [int(n) for n in right.recv_counts]
    assert mine.recv_per_expert == wanted, f"{where}: recv_per_expert"


def random_results(
    rng: torch.Generator, expected: Sequence[ExpectedRows], hidden: int, topk: int, worst: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows and weights to combine on every rank; NaN in rows that nobody sent."""
    rows, weights = [], []
    for one in expected:
        count = len(one.source)
        total = worst or count
        y = torch.full((total, hidden), float("nan"), dtype=torch.bfloat16)
        w = torch.full((total, topk), float("nan"))
        y[:count] = random_rows(rng, count, hidden)
        w[:count] = torch.randn((count, topk), generator=rng)
        rows.append(y)
        weights.append(w)
    return rows, weights


def check_combined(
    got: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    expected: Sequence[ExpectedRows],
    num_tokens: Sequence[int],
    bias: Sequence[Sequence[torch.Tensor]] | None = None,
) -> None:
    """Within the last rounding of the FP64 sum, and bit for bit the FP32 sum in rank order."""
    sources = [one.source for one in expected]
    exact = reference.combine(rows, sources, num_tokens, bias)
    sizes = reference.combine([r.abs() for r in rows], sources, num_tokens, None)
    ordered = [torch.zeros(one.shape) for one in exact]
    for rank, biases in enumerate(bias or []):
        for one in biases:
            ordered[rank] = ordered[rank] + one.float()
            sizes[rank] = sizes[rank] + one.double().abs()
    for rank, source in enumerate(sources):
        for row, (sender, token) in enumerate(source):
            ordered[sender][token] = ordered[sender][token] + rows[rank][row].float()
    for rank, mine in enumerate(got):
        unit = 2.0**-8 if mine.dtype is torch.bfloat16 else 2.0**-24
        bound = unit * 1.01 * exact[rank].abs() + 2.0**-20 * sizes[rank] + 1e-37
        error = (mine.double() - exact[rank]).abs()
        assert (error <= bound).all(), f"rank {rank}: {float((error / bound).max()):.3g} bounds"
        assert torch.equal(mine, ordered[rank].to(mine.dtype)), f"rank {rank}: order of additions"
