"""Rows alone, along a layout: a token may go to every rank, to more than it can have choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import programs
import pytest
import torch
from expect import check_combined, check_received, random_results
from node_groups import NodePlace, Pair, check_near, sum_by_nodes
from ranks import Group, Place, ThreadGroup
from support import random_rows

from ep_runtime import ShapeError
from ep_runtime.normal.reference import ExpectedRows, RankTokens

HIDDEN = 128
TOPK = 3  # of the weights that a combine brings home
MOST = 3  # tokens
SIZES = {"max_tokens": MOST, "max_hidden": HIDDEN, "max_experts": 72, "pool_bytes": 0}
OpenThreads = Callable[..., Group]


@pytest.fixture
def open_threads() -> Iterator[OpenThreads]:
    """Makes groups of CPU ranks; closes them."""
    groups: list[Group] = []

    def make(num_ranks: int, **sizes: Any) -> Group:
        groups.append(ThreadGroup(num_ranks, "host", None, **{**SIZES, **sizes}))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def tokens_for_all(rng: torch.Generator, num_ranks: int) -> list[RankTokens]:
    """Up to MOST tokens a rank. As the reference sees it, each has a choice on every rank."""
    choices = torch.arange(num_ranks)
    inputs = []
    for rank in range(num_ranks):
        count = MOST - rank % (MOST + 1)
        every = choices.expand(count, num_ranks).contiguous()
        inputs.append(RankTokens(random_rows(rng, count, HIDDEN), every, torch.zeros(every.shape)))
    return inputs


def work_of(
    rng: torch.Generator, inputs: Sequence[RankTokens], expected: Sequence[ExpectedRows]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor]]]:
    """Rows, weights and two biases for a combine of every rank."""
    rows, weights = random_results(rng, expected, HIDDEN, TOPK)
    bias = [
        [torch.randn(one.x.shape, generator=rng).bfloat16() for _ in range(2)] for one in inputs
    ]
    return rows, weights, bias


@pytest.mark.parametrize("num_ranks", [33, 72])
def test_all_ranks_get_every_token_and_their_rows_add_up(
    open_threads: OpenThreads, rng: torch.Generator, num_ranks: int
) -> None:
    group = open_threads(num_ranks)
    inputs = tokens_for_all(rng, num_ranks)
    counts = [one.x.shape[0] for one in inputs]
    group.run(programs.poison)
    got = group.run(programs.dispatch_everywhere, [(one,) for one in inputs])
    expected = check_received(got, inputs, num_ranks, topk=False)
    assert {len(one.source) for one in expected} == {sum(counts)}
    rows, weights, bias = work_of(rng, inputs, expected)
    home = group.run(programs.combine, list(zip(rows, weights, bias, strict=True)))
    check_combined([y for y, _ in home], rows, expected, counts, bias)
    check_combined([w for _, w in home], weights, expected, counts)


@pytest.mark.parametrize("between", ["direct", "puts"])
def test_across_nodes_as_in_a_flat_group(
    open_threads: OpenThreads, rng: torch.Generator, between: str
) -> None:
    """Rows cross with the numbers of 34 ranks, more than a token can have choices."""
    nodes = NodePlace(Place("threads", "host", 34), 17, between)
    ranks, per_node = nodes.num_ranks, nodes.ranks_per_node

    def opened(way: str) -> Group:
        # Room for the names of two ranks beyond max_topk, beside rows of HIDDEN channels.
        wide = HIDDEN if way == "direct" else 2 * HIDDEN
        return open_threads(ranks, max_hidden=wide, ranks_per_node=per_node, between_nodes=way)

    pair = Pair(opened(between), opened("flat"))
    inputs = tokens_for_all(rng, ranks)
    counts = [one.x.shape[0] for one in inputs]
    got = pair.both(programs.dispatch_everywhere, [(one,) for one in inputs])
    expected = check_received(got, inputs, ranks, topk=False)
    rows, weights, bias = work_of(rng, inputs, expected)
    home = pair.both(programs.combine, list(zip(rows, weights, bias, strict=True)))
    for which, given, added in ((0, rows, bias), (1, weights, None)):
        mine = [one[which] for one in home]
        right = sum_by_nodes(given, expected, counts, per_node, added)
        assert all(map(torch.equal, mine, right)), "order of additions"
        check_near(mine, given, expected, counts, added)


def test_a_region_without_room_for_the_names_is_told(
    open_threads: OpenThreads, rng: torch.Generator
) -> None:
    group = open_threads(34, ranks_per_node=17, between_nodes="puts", max_topk=1)
    told = group.outcomes(programs.dispatch_everywhere, [(one,) for one in tokens_for_all(rng, 34)])
    for error in told:
        assert isinstance(error, ShapeError)
        assert "top-k 34" in str(error)
        assert "larger max_tokens, max_hidden or max_topk" in str(error)
