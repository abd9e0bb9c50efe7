"""Ranks that disagree about an operation are told, before a row lies where it does not belong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import programs
import pytest
import torch
from expect import check_received, random_tokens
from ranks import Group, Place

from ep_runtime import DesyncError
from ep_runtime.normal.reference import RankTokens

OpenGroup = Callable[..., Group]
EXPERTS = 16


def other_width(one: RankTokens) -> RankTokens:
    return replace(one, x=one.x[:, :128].contiguous())


def other_format(one: RankTokens) -> RankTokens:
    """As a rank without tokens may have them at hand."""
    empty = RankTokens(one.x[:0], one.topk_idx[:0], one.topk_weights[:0])
    return replace(
        empty, x=torch.empty(0, 256, dtype=torch.float8_e4m3fn), scales=torch.empty(0, 2)
    )


def other_topk(one: RankTokens) -> RankTokens:
    fewer = one.topk_weights[:, :2].contiguous()
    return replace(one, topk_idx=one.topk_idx[:, :2].contiguous(), topk_weights=fewer)


@pytest.mark.parametrize("spoil", [other_width, other_format, other_topk])
@pytest.mark.parametrize("worst", [False, True])
def test_dispatches_of_other_rows_are_told(
    open_group: OpenGroup,
    place: Place,
    rng: torch.Generator,
    spoil: Callable[[RankTokens], RankTokens],
    worst: bool,
) -> None:
    if place.num_ranks == 1:
        pytest.skip("one rank agrees with itself")
    group = open_group(max_tokens=12, max_hidden=256, max_experts=EXPERTS, max_topk=4)
    options = {"num_experts": EXPERTS, "num_worst_tokens": 12 * place.num_ranks if worst else 0}
    good = [random_tokens(rng, 8, 256, 4, EXPERTS) for _ in range(place.num_ranks)]
    bad = [*good[:-1], spoil(good[-1])]
    told = group.outcomes(programs.dispatch_with, [(one, options) for one in bad])
    told += group.outcomes(programs.query, [("check",)] * place.num_ranks)
    errors = [one for one in told if isinstance(one, Exception)]
    assert errors
    assert all(isinstance(one, DesyncError) for one in errors)
    assert any("rows of" in str(one) and "K=" in str(one) for one in errors)
    group.run(programs.query, [("reset",)] * place.num_ranks)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in good])
    check_received(got, good, EXPERTS)


def test_combines_with_weights_on_some_ranks_are_told(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    if place.num_ranks == 1:
        pytest.skip("one rank agrees with itself")
    group = open_group(max_tokens=12, max_hidden=256, max_experts=EXPERTS, max_topk=4)
    inputs = [random_tokens(rng, 12, 256, 4, EXPERTS, idle=0.0) for _ in range(place.num_ranks)]
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
    rows = [torch.zeros(one.x.shape, dtype=torch.bfloat16) for one in got]
    weights = [torch.zeros(len(y), 4) if rank else None for rank, y in enumerate(rows)]
    told = group.outcomes(
        programs.combine, [(y, w, []) for y, w in zip(rows, weights, strict=True)]
    )
    told += group.outcomes(programs.query, [("check",)] * place.num_ranks)
    errors = [one for one in told if isinstance(one, Exception)]
    assert errors
    assert all(isinstance(one, DesyncError) for one in errors)
