"""What operations add up for their callers: rows per expert, and how long each rank was late."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from drivers import Options
from groups import Group, Place, ProcessGroup
from support import (
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference

OpenGroup = Callable[[EpConfig], Group]
LATE_S = 0.2


@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
def test_rows_per_expert_add_up_over_dispatches(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    config = random_config(rng, place.num_ranks, 128, 4, recv_format=recv_format)
    group = open_group(config)
    experts = config.local_experts(place.num_ranks)
    sums = torch.zeros(place.num_ranks, experts, dtype=torch.int32)
    for turn in range(5):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        counting = turn != 2  # a dispatch that was not asked leaves the sums alone
        got = group.dispatch(inputs, turn % 2, options=Options(counting=counting))
        check_received(got, expected)
        if counting:
            sums += torch.stack([one.recv_count for one in expected])
        tallies = torch.stack([cumulative for cumulative, _, _ in group.all("tallies")])
        assert torch.equal(tallies, sums)


def test_times_of_waiting_never_shrink(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 128, 4)
    group = open_group(config)
    before = [torch.zeros(2, place.num_ranks, dtype=torch.int64)] * place.num_ranks
    for _ in range(3):
        inputs = random_inputs(rng, config, place.num_ranks)
        expected = reference.dispatch(config, inputs)
        check_received(group.dispatch(inputs, options=Options(timing=True)), expected)
        outputs = random_outputs(rng, expected)
        check_combined(group.combine(outputs), config, inputs, outputs)
        after = [torch.stack(waited) for _, *waited in group.all("tallies")]
        for new, old in zip(after, before, strict=True):
            assert (new >= old).all()
            assert (new < 60e9).all()  # nanoseconds
        before = after


def late(group: ProcessGroup, rank: int, first: list[tuple[object, ...]]) -> list[object]:
    """Everybody makes the two calls of `first`, `rank` a while after the others.

    first: per rank (method of the send, its arguments, method of the receive, its arguments)
    """
    for peer, (method, given, *_) in enumerate(first):
        if peer != rank:
            group.pool.send(peer, ("call", method, given))
    for peer, (_, _, method, given) in enumerate(first):
        if peer != rank:
            answer = group.pool.answer(peer)
            assert answer is None, answer
            group.pool.send(peer, ("call", method, given))
    time.sleep(LATE_S)
    method, given, last_method, last_given = first[rank]
    group.pool.send(rank, ("call", method, given))
    answer = group.pool.answer(rank)
    assert answer is None, answer
    group.pool.send(rank, ("call", last_method, last_given))
    return [group.pool.answer(peer) for peer in range(group.num_ranks)]


def test_a_late_rank_is_told_from_the_others(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 128, 4)
    group = open_group(config)
    if not isinstance(group, ProcessGroup):
        pytest.skip("ranks of one process are called in turn: none waits for another")
    timing, slow = Options(timing=True), place.num_ranks - 1
    inputs = [random_input(rng, config, 5) for _ in range(place.num_ranks)]
    expected = reference.dispatch(config, inputs)
    group.dispatch(inputs, options=timing)  # kernels are loaded, processes are awake
    outputs = random_outputs(rng, expected)
    group.combine(outputs)
    start = group.all("tallies")

    got = late(
        group, slow, [("dispatch", (x, 0, None, 0, timing), "receive", (0,)) for x in inputs]
    )
    check_received(got, expected)  # type: ignore[arg-type]
    sent = group.all("tallies")
    steps = group.all("query", "stats", 0)
    got = late(group, slow, [("combine", (y,), "collect", (0,)) for y in outputs])
    check_combined(got, config, inputs, outputs)  # type: ignore[arg-type]
    home = group.all("tallies")

    for rank in range(place.num_ranks):
        if rank == slow:
            continue
        waited = [sent[rank][1] - start[rank][1], home[rank][2] - sent[rank][2]]
        for ns in waited:
            assert int(ns[slow]) > 0.6 * LATE_S * 1e9, (rank, waited)
            assert int(ns[rank]) < 0.5 * LATE_S * 1e9, (rank, waited)  # itself
        assert torch.equal(home[rank][1], sent[rank][1])  # a combine adds to its own alone
        assert torch.equal(sent[rank][2], start[rank][2])
        assert steps[rank].wait_ns[slow] > 0.6 * LATE_S * 1e9
