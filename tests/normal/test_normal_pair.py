"""Normal dispatch and combine against the reference, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import programs
import pytest
import torch
from expect import (
    below,
    check_combined,
    check_received,
    random_experts,
    random_group,
    random_results,
    random_tokens,
)
from ranks import Group, Place

from ep_runtime.normal import reference
from ep_runtime.normal.reference import ExpectedRows, RankTokens

OpenGroup = Callable[..., Group]
MOST = 40


def counts_of(inputs: list[RankTokens]) -> list[int]:
    return [one.x.shape[0] for one in inputs]


def combine_and_check(
    rng: torch.Generator,
    group: Group,
    inputs: list[RankTokens],
    expected: list[ExpectedRows],
    *,
    hidden: int,
    topk: int,
    biases: int = 0,
    worst: int = 0,
    name: str = "last",
    extra: int = 0,
) -> None:
    rows, weights = random_results(rng, expected, hidden, topk, worst)
    tokens = counts_of(inputs)
    bias = [
        [torch.randn((t, hidden), generator=rng).bfloat16() for _ in range(biases)] for t in tokens
    ]
    got = group.run(
        programs.combine,
        [(y, w, b, name, extra) for y, w, b in zip(rows, weights, bias, strict=True)],
    )
    check_combined([y for y, _ in got], rows, expected, tokens, bias)
    check_combined([w for _, w in got], weights, expected, tokens)


@pytest.mark.parametrize("topk", [1, 2, 8, 32])
@pytest.mark.parametrize("scales", [None, "float32", "int32", "flat"])
def test_pairs_match_the_reference(
    open_group: OpenGroup, place: Place, rng: torch.Generator, scales: str | None, topk: int
) -> None:
    group = open_group(max_tokens=MOST, max_hidden=1024, max_experts=64, max_topk=32)
    hidden = (256, 272, 1024, 880)[below(rng, 4)]
    for turn in range(3):
        experts = random_experts(rng, place.num_ranks, topk)
        inputs = random_group(rng, place.num_ranks, hidden, topk, experts, MOST, scales=scales)
        alignment = (1, 4, 128)[turn]
        options = {"num_experts": experts, "expert_alignment": alignment}
        group.run(programs.poison)
        got = group.run(programs.dispatch_with, [(one, options, 16 * turn) for one in inputs])
        expected = check_received(got, inputs, experts, alignment=alignment)
        combine_and_check(
            rng, group, inputs, expected, hidden=hidden, topk=topk, biases=turn, extra=8 * turn
        )


@pytest.mark.parametrize("hidden", [128, 7168, 16384])
def test_small_and_large_rows(
    open_group: OpenGroup, place: Place, rng: torch.Generator, hidden: int
) -> None:
    group = open_group(max_tokens=12, max_hidden=hidden, max_experts=32, max_topk=8)
    for scales in (None, "float32"):
        experts = random_experts(rng, place.num_ranks, 4)
        inputs = random_group(rng, place.num_ranks, hidden, 4, experts, 12, scales=scales)
        group.run(programs.poison)
        options = {"num_experts": experts}
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        expected = check_received(got, inputs, experts)
        combine_and_check(rng, group, inputs, expected, hidden=hidden, topk=4)


def test_all_tokens_of_all_ranks_go_to_one_rank(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    experts, ranks = 4 * place.num_ranks, place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=256, max_experts=64)
    for target in {0, ranks - 1}:
        inputs = [random_tokens(rng, MOST, 256, 4, experts) for _ in range(ranks)]
        for one in inputs:
            one.topk_idx[:] = torch.arange(4) + 4 * target
        group.run(programs.poison)
        options = {"num_experts": experts}
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        expected = check_received(got, inputs, experts)
        assert len(expected[target].source) == MOST * ranks
        combine_and_check(rng, group, inputs, expected, hidden=256, topk=4)


def test_nobody_has_a_token(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    experts = 2 * place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=256, max_experts=64)
    inputs = [random_tokens(rng, 0, 256, 2, experts) for _ in range(place.num_ranks)]
    got = group.run(programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs])
    expected = check_received(got, inputs, experts)
    combine_and_check(rng, group, inputs, expected, hidden=256, topk=2)


@pytest.mark.parametrize("with_topk", [True, False])
def test_layout_as_a_call_of_its_own(
    open_group: OpenGroup, place: Place, rng: torch.Generator, with_topk: bool
) -> None:
    group = open_group(max_tokens=MOST, max_hidden=256, max_experts=64)
    experts = random_experts(rng, place.num_ranks, 4)
    inputs = random_group(rng, place.num_ranks, 256, 4, experts, MOST)
    got = group.run(programs.layout_then_dispatch, [(one, experts, with_topk) for one in inputs])
    for (found, _), one in zip(got, inputs, strict=True):
        right = reference.layout(one.topk_idx, place.num_ranks, experts)
        assert torch.equal(found[0], right.tokens_per_rank)
        assert torch.equal(found[1], right.tokens_per_expert)
        assert torch.equal(found[2], right.is_token_in_rank)
    check_received([rows for _, rows in got], inputs, experts, topk=with_topk)
    if not with_topk:
        assert all(rows.topk_idx is None and rows.topk_weights is None for _, rows in got)


def test_worst_case_mode_gives_exactly_that_many_rows(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=512, max_experts=64)
    for extra, scales in ((0, None), (7, "float32")):
        worst = ranks * MOST + extra
        experts = random_experts(rng, ranks, 4)
        inputs = random_group(rng, ranks, 512, 4, experts, MOST, scales=scales)
        group.run(programs.forget)
        group.run(programs.poison)
        options = {"num_experts": experts, "num_worst_tokens": worst, "expert_alignment": 8}
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        expected = check_received(got, inputs, experts, alignment=8, worst=worst)
        combine_and_check(rng, group, inputs, expected, hidden=512, topk=4, worst=worst, biases=1)


def test_cached_handles_after_other_traffic(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=512, max_experts=64)
    experts = random_experts(rng, ranks, 4)
    first = random_group(rng, ranks, 512, 4, experts, MOST)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": experts}) for one in first])
    expected = check_received(got, first, experts)
    group.run(programs.rename, [("first",)] * ranks)
    for turn in range(4):
        other = random_group(rng, ranks, 256, 2, experts, MOST, scales="float32")
        got = group.run(programs.dispatch_with, [(one, {"num_experts": experts}) for one in other])
        check_received(got, other, experts)
        # Other rows the way of the first: bf16 of another width, or fp8.
        again = [
            random_tokens(rng, n, 384, 4, experts, scales="float32" if turn % 2 else None)
            for n in counts_of(first)
        ]
        sent = [
            RankTokens(new.x, old.topk_idx, new.topk_weights, new.scales)
            for new, old in zip(again, first, strict=True)
        ]
        weighted = turn >= 2
        got = group.run(programs.cached, [(one, "first", weighted) for one in sent])
        check_received(got, sent, experts, topk=False)
        if weighted:
            _check_whole_weights(got, sent, expected)
        combine_and_check(
            rng, group, first, expected, hidden=512, topk=4, name="first", biases=turn % 3
        )


def _check_whole_weights(
    got: list[programs.Rows], sent: list[RankTokens], expected: list[ExpectedRows]
) -> None:
    """Along a cached handle weights arrive unmasked: they may be gradients of anything."""
    for mine, right in zip(got, expected, strict=True):
        assert mine.topk_weights is not None
        for row, (sender, token) in enumerate(right.source):
            assert torch.equal(mine.topk_weights[row], sent[sender].topk_weights[token])


def test_random_traffic_on_one_buffer(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Exact and worst-case dispatches, several handles alive, combined in another order."""
    ranks = place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=256, max_experts=64, max_topk=8)
    worst = ranks * MOST
    alive: list[tuple[str, list[RankTokens], list[ExpectedRows], int]] = []
    for turn in range(12):
        experts = random_experts(rng, ranks, 4)
        inputs = random_group(rng, ranks, 256, 4, experts, MOST)
        rows = worst if below(rng, 2) else 0
        options = {"num_experts": experts, "num_worst_tokens": rows}
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        expected = reference.dispatch(inputs, experts)
        for mine, right in zip(got, expected, strict=True):
            count = len(right.source)
            assert torch.equal(mine.x[:count], right.x)
            assert mine.topk_idx is not None
            assert torch.equal(mine.topk_idx[:count], right.topk_idx)
        name = f"turn{turn}"
        group.run(programs.rename, [(name,)] * ranks)
        alive.append((name, inputs, expected, rows))
        while len(alive) > below(rng, 4):
            name, inputs, expected, rows = alive.pop(below(rng, len(alive)))
            combine_and_check(
                rng, group, inputs, expected, hidden=256, topk=4, worst=rows, name=name
            )
            group.run(programs.drop, [(name,)] * ranks)
