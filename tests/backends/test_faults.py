"""What goes wrong at run time: recorded on the device, raised at the next host check, no hang."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from drivers import Options
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import (
    DesyncError,
    EpConfig,
    PeerTimeout,
    RoutingFault,
    SequenceError,
    reference,
)

OpenGroup = Callable[[EpConfig], Group]
BUDGET_S = 0.5


def good_pair(group: Group, config: EpConfig, rng: torch.Generator) -> None:
    """A dispatch and combine that must work."""
    inputs = random_inputs(rng, config, group.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs), config, inputs, outputs)


def same_work(rng: torch.Generator, config: EpConfig, group: Group) -> list[tuple[object, ...]]:
    """Arguments of a dispatch on every rank, each with a few tokens."""
    return [(random_input(rng, config, 5), 0) for _ in range(group.num_ranks)]


def test_impossible_experts_count_as_none_and_are_reported(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    inputs = [random_input(rng, config, 7) for _ in range(place.num_ranks)]
    bad = inputs[1].topk_idx
    bad[0, 1] = config.num_experts
    bad[2, 0] = -2
    bad[3, 3] = 2**31 - 1
    bad[4] = torch.tensor([1, 0, 1, 0])
    assert reference.clean_routes(config, inputs[1])[1] == 5
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)

    outcomes = group.outcomes("check", [()] * place.num_ranks)
    assert [type(o) for o in outcomes] == [
        RoutingFault if rank == 1 else type(None) for rank in range(place.num_ranks)
    ]
    text = str(outcomes[1])
    assert text.startswith("5 entries")
    assert f"0 .. {config.num_experts - 1}" in text

    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs), config, inputs, outputs)  # the group works on
    group.all("check")  # and the fault is raised once
    good_pair(group, config, rng)


def test_expert_numbers_beyond_32_bits_are_reported(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 2)
    group = open_group(config)
    inputs = [random_input(rng, config, 3) for _ in range(place.num_ranks)]
    wide = inputs[0].topk_idx.long()
    wide[1, 0] = 2**32 + 1  # its low half is a real expert
    wide[2, 0] = -(2**40)
    inputs[0] = reference.RankInput(inputs[0].x, wide, inputs[0].topk_weights)
    check_received(group.dispatch(inputs), reference.dispatch(config, inputs))
    assert isinstance(group.outcomes("check", [()] * place.num_ranks)[0], RoutingFault)


def test_absent_rank_is_named_within_the_budget(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    good_pair(group, config, rng)
    group.all("query", "set_time_budget", BUDGET_S)
    absent = place.num_ranks - 1
    there = [None if rank == absent else () for rank in range(place.num_ranks)]
    group.outcomes(
        "dispatch",
        [
            None if given is None else work
            for given, work in zip(there, same_work(rng, config, group), strict=True)
        ],
    )
    started = time.monotonic()
    outcomes = group.outcomes("receive_alone", there)
    assert time.monotonic() - started < 20 * BUDGET_S
    for rank, outcome in enumerate(outcomes):
        if rank != absent:
            assert isinstance(outcome, PeerTimeout), outcome
            assert outcome.peer == absent
            assert "reset()" in str(outcome)

    # The absent rank hears of it too, and nothing that follows waits again.
    late = group.outcomes("dispatch", same_work(rng, config, group))
    late = [
        a or b for a, b in zip(late, group.outcomes("check", [()] * place.num_ranks), strict=True)
    ]
    assert all(isinstance(outcome, PeerTimeout) for outcome in late), late
    assert {outcome.peer for outcome in late} == {absent}

    group.all("query", "reset")
    good_pair(group, config, rng)


def test_combine_of_an_unfinished_dispatch_reads_nothing_of_it(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Launched before the host knows: the handle's memory holds rows that are none."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    group.all("open_receive", "fresh", {})
    group.all("query", "set_time_budget", BUDGET_S)
    there = [None if rank == 1 else () for rank in range(place.num_ranks)]
    how = (None, 0, Options(into="fresh"))
    work = [None if t is None else (random_input(rng, config, 5), 0, *how) for t in there]
    group.outcomes("dispatch", work)
    outcomes = group.outcomes("combine_unreceived", there)
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert isinstance(outcome, PeerTimeout), outcome
            assert outcome.peer == 1
    group.all("use_gpu")
    group.all("query", "reset")
    good_pair(group, config, rng)


def test_rank_that_lost_its_state_is_noticed(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    for _ in range(2):
        good_pair(group, config, rng)
    group.all("query", "set_time_budget", BUDGET_S)
    group.outcomes("reset_alone", [() if r == 0 else None for r in range(place.num_ranks)])
    group.outcomes("dispatch", same_work(rng, config, group))
    group.outcomes("receive", [(0,)] * place.num_ranks)
    outcomes = group.outcomes("check", [()] * place.num_ranks)
    assert isinstance(outcomes[0], DesyncError), outcomes[0]
    assert all(isinstance(o, DesyncError | PeerTimeout) for o in outcomes), outcomes
    group.all("query", "reset")
    good_pair(group, config, rng)


def test_reset_drops_what_is_in_flight(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    good_pair(group, config, rng)
    group.each("dispatch", same_work(rng, config, group))
    group.all("query", "reset")
    assert group.all("query", "epochs", 0) == [(0, 0)] * place.num_ranks
    started = time.monotonic()
    for outcome in group.outcomes("receive", [(0,)] * place.num_ranks):
        assert isinstance(outcome, SequenceError), outcome
        assert "dropped by reset()" in str(outcome)
    assert time.monotonic() - started < 5  # nobody waits for what nobody sends
    good_pair(group, config, rng)
    assert group.all("query", "epochs", 0) == [(1, 1)] * place.num_ranks


def test_reset_ends_the_handles_from_before(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """What their dispatches left may be unfinished."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    inputs = random_inputs(rng, config, group.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    group.all("query", "reset")
    outcomes = group.outcomes("combine", [(y, 0) for y in random_outputs(rng, expected)])
    assert all(isinstance(o, SequenceError) and "stale" in str(o) for o in outcomes), outcomes
    good_pair(group, config, rng)
