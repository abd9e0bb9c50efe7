"""Ranks that are masked: the others neither send to them nor wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drivers import Options
from groups import Group, Place
from support import (
    Snapshot,
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import ConfigError, DesyncError, EpConfig, PeerTimeout, reference
from ep_runtime.reference import RankInput

OpenGroup = Callable[[EpConfig], Group]
BUDGET_S = 0.5


def among(group: Group, ranks: Iterable[int], method: str, *arguments: list[Any]) -> list[Any]:
    """Call `method` on some ranks, each with its own of every argument; the others do nothing.

    Results by rank, None for the others; raises what a rank raises.
    """
    chosen = set(ranks)
    given = [
        tuple(values[rank] for values in arguments) if rank in chosen else None
        for rank in range(group.num_ranks)
    ]
    results = group.outcomes(method, given)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def mask(group: Group, ranks: Iterable[int], peer: int, masked: bool = True) -> None:
    """Mask `peer` (or no longer) on `ranks`."""
    n = group.num_ranks
    among(group, ranks, "query", ["set_rank_mask"] * n, [peer] * n, [masked] * n)


def pair_without(
    group: Group, config: EpConfig, rng: torch.Generator, masked: set[int], *, calling: bool
) -> None:
    """A dispatch and its combine, right on the ranks that are left; `calling`: the masked ranks
    make the calls as well.
    """
    n = group.num_ranks
    left = [rank for rank in range(n) if rank not in masked]
    ranks = list(range(n)) if calling else left
    inputs = random_inputs(rng, config, n, padded=True)
    counted = reference.without(config, inputs, masked)
    expected = reference.dispatch(config, counted)
    among(group, ranks, "dispatch", inputs)
    received = among(group, ranks, "receive")
    outputs = random_outputs(rng, expected)
    among(group, ranks, "combine", outputs)
    results = among(group, ranks, "collect")
    among(group, ranks, "check")
    for rank in ranks:
        check_received_by(rank, received, expected)
        check_combined_at(rank, results, config, counted, outputs)
    if calling:
        for rank in masked:
            assert (results[rank] == 0).all()


def check_received_by(rank: int, got: list[Snapshot], expected: list[reference.Expected]) -> None:
    check_received([got[rank]], [expected[rank]])


def check_combined_at(
    rank: int,
    got: list[torch.Tensor],
    config: EpConfig,
    inputs: list[RankInput],
    outputs: list[torch.Tensor],
) -> None:
    """One rank's result; those of the others stand in for themselves."""
    right = reference.combine_in_order(config, inputs, outputs)
    check_combined([*right[:rank], got[rank], *right[rank + 1 :]], config, inputs, outputs)


@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
def test_masked_rank_gets_nothing_and_gives_nothing(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    """It goes on calling, masked on itself too: its operations move nothing."""
    config = random_config(rng, place.num_ranks, 256, 4, recv_format=recv_format)
    group = open_group(config)
    everyone = range(place.num_ranks)
    pair_without(group, config, rng, set(), calling=True)
    mask(group, everyone, 1)
    assert group.all("query", "masked_ranks") == [[1]] * place.num_ranks
    for _ in range(3):
        pair_without(group, config, rng, {1}, calling=True)
    mask(group, everyone, 1, False)  # all ranks are at the same operation and have finished it
    for _ in range(3):
        pair_without(group, config, rng, set(), calling=True)


def test_masks_count_where_the_combine_begins(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Masked after the dispatch: what the rank received is not asked for any more."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    gone = place.num_ranks - 1
    inputs = [random_input(rng, config, 9) for _ in range(place.num_ranks)]
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    left = range(gone)
    mask(group, left, gone)
    outputs = random_outputs(rng, expected)
    among(group, left, "combine", outputs)
    results = among(group, left, "collect")
    outputs[gone] = torch.zeros_like(outputs[gone])  # as if it had brought back zeros
    for rank in left:
        check_combined_at(rank, results, config, inputs, outputs)


def test_the_others_go_on_when_a_rank_is_gone(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Time out, mask the rank that is named, reset among those that are left; later all again."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    n, gone = place.num_ranks, place.num_ranks - 1
    left = range(gone)
    pair_without(group, config, rng, set(), calling=True)
    group.all("query", "set_time_budget", BUDGET_S)

    among(group, left, "dispatch", random_inputs(rng, config, n))
    outcomes = group.outcomes("receive_alone", [() if rank in left else None for rank in range(n)])
    for rank in left:
        assert isinstance(outcomes[rank], PeerTimeout), outcomes[rank]
        assert outcomes[rank].peer == gone
    mask(group, left, gone)
    among(group, left, "query", ["reset"] * n)
    started = time.monotonic()
    for _ in range(3):
        pair_without(group, config, rng, {gone}, calling=False)
    assert time.monotonic() - started < 20  # and nobody waited for it

    mask(group, left, gone, False)
    group.all("query", "reset")
    pair_without(group, config, rng, set(), calling=True)


def test_what_a_masked_rank_gives_up_on_stops_nobody(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """It is alive and does not know: it waits for the others and tells them that it gave up."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    n, cut_off = place.num_ranks, 0
    left = range(1, n)
    group.all("query", "set_time_budget", BUDGET_S)
    mask(group, left, cut_off)
    for _ in range(2):
        among(group, [cut_off], "dispatch", random_inputs(rng, config, n))
        alone = [() if rank == cut_off else None for rank in range(n)]
        outcome = group.outcomes("receive_alone", alone)[cut_off]
        assert isinstance(outcome, PeerTimeout), outcome
        pair_without(group, config, rng, {cut_off}, calling=False)
        # Masked on itself it meets nobody: it starts again, still unaware of the others.
        mask(group, [cut_off], cut_off)
        among(group, [cut_off], "query", ["reset"] * n)
        mask(group, [cut_off], cut_off, False)
    mask(group, left, cut_off, False)
    group.all("query", "reset")
    pair_without(group, config, rng, set(), calling=True)


@pytest.mark.parametrize(
    "options", [Options(), Options(round_scale=True)], ids=["plain", "rounded"]
)
def test_ranks_whose_masks_differ_are_told(
    open_group: OpenGroup, place: Place, rng: torch.Generator, options: Options
) -> None:
    if place.num_ranks < 3:
        pytest.skip("two ranks that are left, and one that only one of them masks")
    config = random_config(rng, place.num_ranks, 256, 4, dispatch_format="fp8")
    group = open_group(config)
    n, gone = place.num_ranks, place.num_ranks - 1
    left = range(gone)
    pair_without(group, config, rng, set(), calling=True)
    group.all("query", "set_time_budget", BUDGET_S)
    mask(group, [0], gone)
    inputs = random_inputs(rng, config, n)
    among(group, left, "dispatch", inputs, [0] * n, [None] * n, [0] * n, [options] * n)
    started = time.monotonic()
    outcomes = group.outcomes("receive_alone", [() if rank in left else None for rank in range(n)])
    assert time.monotonic() - started < 20 * BUDGET_S
    for rank in left:
        assert isinstance(outcomes[rank], DesyncError | PeerTimeout), outcomes[rank]
    found = [
        str(one) for one in outcomes if isinstance(one, DesyncError) and "works at" in str(one)
    ]
    assert found
    for text in found:
        assert "rank mask 0x0 and" in text
        assert f"rank mask {1 << gone:#x} and" in text

    mask(group, left, gone)
    among(group, left, "query", ["reset"] * n)
    pair_without(group, config, rng, {gone}, calling=False)


def test_reset_wants_the_same_mask_everywhere(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    if place.kind != "processes" or place.num_ranks < 4:
        pytest.skip("virtual ranks do not meet")
    group = open_group(random_config(rng, place.num_ranks, 256, 4))
    left = range(3)
    mask(group, left, 3)
    mask(group, [1], 2)
    group.all("meet_within", 2.0)
    outcomes = group.outcomes("query", [("reset",) if rank in left else None for rank in range(4)])
    assert all(isinstance(outcome, ConfigError) for outcome in outcomes[:3]), outcomes
    assert "rank 1 goes on without ranks [2, 3], rank 0 without [3]" in str(outcomes[0])
    mask(group, [1], 2, False)
    group.all("meet_within", 30.0)
    among(group, left, "query", ["reset"] * 4)


def test_masks_are_kept_and_told(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    group = open_group(random_config(rng, place.num_ranks, 256, 4))
    n, last = place.num_ranks, place.num_ranks - 1
    mask(group, range(n), last)
    assert [one.tolist() for one in group.all("mask")] == [[0] * last + [1]] * n
    group.all("query", "reset")
    assert group.all("query", "masked_ranks") == [[last]] * n
    mask(group, range(n), 0)
    mask(group, range(n), last, False)
    assert group.all("query", "masked_ranks") == [[0]] * n
    group.all("query", "clear_rank_mask")
    assert [one.tolist() for one in group.all("mask")] == [[0] * n] * n
    for bad in (-1, n, None, True):
        outcomes = group.outcomes("query", [("set_rank_mask", bad, True)] * n)
        assert all("it must be a rank" in str(outcome) for outcome in outcomes)


def test_fused_operations_and_late_weights_leave_masked_ranks_out(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    if not group.can_fuse:
        pytest.skip("ranks that share a thread or a GPU cannot fuse")
    n, gone = place.num_ranks, place.num_ranks - 1
    left = range(gone)
    mask(group, left, gone)
    for late in (False, True):
        inputs = random_inputs(rng, config, n, padded=True)
        counted = reference.without(config, inputs, {gone})
        expected = reference.dispatch(config, counted)
        among(group, left, "dispatch_fused", inputs, [0] * n, [Options(late=late)] * n)
        received = among(group, left, "fused_result")
        outputs = random_outputs(rng, expected)
        weights = [torch.rand_like(one.topk_weights) for one in inputs]
        if late:
            counted = [
                replace(one, topk_weights=w) for one, w in zip(counted, weights, strict=True)
            ]
        given: list[Any] = [one if late else None for one in weights]
        among(group, left, "combine_fused", outputs, [0] * n, given)
        results = among(group, left, "fused_result")
        among(group, left, "check")
        for rank in left:
            check_received_by(rank, received, expected)
            check_combined_at(rank, results, config, counted, outputs)
