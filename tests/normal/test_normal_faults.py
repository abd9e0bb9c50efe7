"""What goes wrong: bad calls before anything is launched, absent ranks within the time budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import programs
import pytest
import torch
from expect import check_received, random_group, random_tokens
from ranks import Group, Place, ThreadGroup

from ep_runtime import (
    _C,
    ConfigError,
    DesyncError,
    PeerTimeout,
    RoutingFault,
)
from ep_runtime.normal import NormalBuffer
from ep_runtime.normal.config import block_bytes

OpenGroup = Callable[..., Group]
EXPERTS = 16
SIZES = {"max_tokens": 16, "max_hidden": 256, "max_experts": 64, "max_topk": 8}
BUDGET_S = 0.5


def good_dispatch(group: Group, rng: torch.Generator) -> None:
    inputs = random_group(rng, group.num_ranks, 256, 4, EXPERTS, 16)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
    check_received(got, inputs, EXPERTS)


def settle(buffer: NormalBuffer) -> None:
    """Raise what the device has recorded by now."""
    buffer._ops.synchronize()
    buffer.check()


@pytest.mark.parametrize("exact", [True, False])
def test_absent_rank_is_named_within_the_budget(
    open_group: OpenGroup, place: Place, rng: torch.Generator, exact: bool
) -> None:
    if place.num_ranks == 1:
        pytest.skip("nobody to wait for")
    group = open_group(**SIZES)
    good_dispatch(group, rng)
    ranks, absent = place.num_ranks, place.num_ranks - 1
    group.run(programs.query, [("set_time_budget", BUDGET_S)] * ranks)
    inputs = random_group(rng, ranks, 256, 4, EXPERTS, 16)
    options = {"num_experts": EXPERTS, "num_worst_tokens": 0 if exact else 16 * ranks}
    started = time.monotonic()
    there = [None if rank == absent else (inputs[rank], options) for rank in range(ranks)]
    outcomes = group.outcomes(programs.dispatch_with, there)
    late = group.outcomes(settle, [None if given is None else () for given in there])
    assert time.monotonic() - started < 20 * BUDGET_S
    for rank in range(ranks - 1):
        told = [o for o in (outcomes[rank], late[rank]) if isinstance(o, BaseException)]
        assert told, f"rank {rank} was not told"
        assert isinstance(told[0], PeerTimeout), told[0]
        assert told[0].peer == absent
        assert "reset()" in str(told[0])
    # The absent rank hears of it, and nothing waits again.
    started = time.monotonic()
    outcomes = group.outcomes(programs.dispatch_with, [(one, options) for one in inputs])
    late = group.outcomes(settle, [()] * ranks)
    assert time.monotonic() - started < 20 * BUDGET_S
    for outcome in [a or b for a, b in zip(late, outcomes, strict=True)]:
        assert isinstance(outcome, PeerTimeout), outcome
        assert outcome.peer == absent
    group.run(programs.query, [("reset",)] * ranks)
    good_dispatch(group, rng)


def test_a_rank_that_does_not_combine_is_named(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    if place.num_ranks == 1:
        pytest.skip("nobody to wait for")
    group, ranks = open_group(**SIZES), place.num_ranks
    inputs = [random_tokens(rng, 8, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]
    for one in inputs:
        one.topk_idx[:, 0] = EXPERTS - 1  # everybody needs the last rank
        one.topk_idx[:, 1:] = torch.arange(3)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
    group.run(programs.query, [("set_time_budget", BUDGET_S)] * ranks)
    there = [
        (torch.zeros(rows.x.shape).bfloat16(), None, []) if rank < ranks - 1 else None
        for rank, rows in enumerate(got)
    ]
    outcomes = group.outcomes(programs.combine, there)
    late = group.outcomes(settle, [None if given is None else () for given in there])
    for rank in range(ranks - 1):
        told = [o for o in (outcomes[rank], late[rank]) if isinstance(o, BaseException)]
        assert told
        assert isinstance(told[0], PeerTimeout), told[0]
        assert told[0].peer == ranks - 1
    group.run(programs.query, [("reset",)] * ranks)
    good_dispatch(group, rng)


def test_impossible_experts_count_as_none_and_are_reported(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    group, ranks = open_group(**SIZES), place.num_ranks
    inputs = [random_tokens(rng, 6, 256, 4, EXPERTS) for _ in range(ranks)]
    bad = inputs[0].topk_idx.long()
    bad[0, 1], bad[2, 0], bad[3, 3] = EXPERTS, -2, 2**40
    inputs[0] = replace(inputs[0], topk_idx=bad)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
    check_received(got, inputs, EXPERTS)
    outcomes = group.outcomes(settle, [()] * ranks)
    assert isinstance(outcomes[0], RoutingFault), outcomes[0]
    assert str(outcomes[0]).startswith("3 entries")
    assert outcomes[1:] == [None] * (ranks - 1)
    good_dispatch(group, rng)  # the group works on, and the fault was raised once


def test_processes_that_differ_are_refused_on_every_rank(
    place: Place, normal_pools: dict[str, Any]
) -> None:
    if place.kind != "processes" or place.name not in normal_pools:
        pytest.skip("for processes")
    pool = normal_pools[place.name]
    sizes = [dict(SIZES) for _ in range(place.num_ranks)]
    sizes[1]["max_hidden"] = 512
    for answer in pool.ask([("open", one) for one in sizes]):
        assert isinstance(answer, ConfigError), answer
        assert "rank" in str(answer)
        assert "max_hidden=" in str(answer)


def test_a_thread_that_stays_away_from_a_collective_is_named() -> None:
    group = ThreadGroup(3, "host", None, **SIZES)
    for buffer in group.buffers:
        buffer.world.timeout_s = 0.3
    outcomes = group.outcomes(programs.query, [("reset",), None, ("reset",)])
    for rank in (0, 2):
        assert isinstance(outcomes[rank], PeerTimeout)
        assert outcomes[rank].peer == 1
    group.close()


def test_more_rows_than_the_worst_case_are_never_written(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    group, ranks = open_group(**SIZES), place.num_ranks
    inputs = [random_tokens(rng, 12, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]
    for one in inputs:
        one.topk_idx[:] = torch.arange(4)  # all of it to rank 0, and others where experts are few
    group.run(programs.poison)
    options = {"num_experts": EXPERTS, "num_worst_tokens": 5}
    group.outcomes(programs.dispatch_with, [(one, options) for one in inputs])
    outcomes = group.outcomes(settle, [()] * ranks)
    for outcome in outcomes:
        assert isinstance(outcome, DesyncError), outcome
    found = [str(outcome) for outcome in outcomes if "at most 5 fit" in str(outcome)]
    assert found, outcomes
    # The remedy is the caller's, and true for whoever hears of it.
    for text in found:
        assert "pass a larger one on every rank" in text
    for text in (str(outcome) for outcome in outcomes):
        assert "impossible counts" not in text
    behind = block_bytes(5, 512, 0, 4)
    for stray in group.run(stray_bytes, [(behind,)] * ranks):
        assert stray == 0, "bytes behind the block were written"
    group.run(programs.query, [("reset",)] * ranks)
    good_dispatch(group, rng)


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("more", [1, -1])
def test_a_layout_that_contradicts_itself_is_told(
    open_group: OpenGroup, place: Place, rng: torch.Generator, tokens: int, more: int
) -> None:
    """Peers would keep, or wait for, rows that never come."""
    group, ranks = open_group(**SIZES), place.num_ranks
    group.run(programs.query, [("set_time_budget", BUDGET_S)] * ranks)
    inputs = [random_tokens(rng, tokens, 256, 4, EXPERTS) for _ in range(ranks)]
    calls = [(one, EXPERTS, more if r == 0 else 0) for r, one in enumerate(inputs)]
    group.outcomes(programs.dispatch_contradicting, calls)
    outcomes = group.outcomes(settle, [()] * ranks)
    assert all(isinstance(one, DesyncError) for one in outcomes), outcomes
    assert "rank 0" in str(outcomes[0])
    assert "the layout it passed is not that of its tokens" in str(outcomes[0])
    group.run(programs.query, [("reset",)] * ranks)
    good_dispatch(group, rng)


def stray_bytes(buffer: NormalBuffer, start: int) -> int:
    """Bytes of the pool from `start` on that are no longer poison."""
    sizes = buffer.heap_sizes
    pool = buffer._heap.view(sizes.pool_offset, sizes.pool, None)
    return int((pool[start:] != programs.POISON).sum())


@pytest.mark.parametrize("change", [{"rank": 4}, {"control": [128]}, {"local": 4}, {"fault": 0}])
def test_native_construction_refuses_what_cannot_be(change: dict[str, Any]) -> None:
    heap = _C.HostMemory(1 << 16)
    good: dict[str, Any] = {
        "num_ranks": 2,
        "rank": 0,
        "max_experts": 8,
        "control": [heap.address] * 2,
        "data": [heap.address] * 2,
        "data_bytes": 1 << 16,
        "local": heap.address,
        "fault": heap.address,
    }
    _C.HostNormal(**good)
    with pytest.raises(ValueError, match="."):
        _C.HostNormal(**(good | change))


def test_blocks_outside_of_the_heap_are_refused() -> None:
    heap = _C.HostMemory(1 << 16)
    rank = _C.HostNormal(
        1, 0, 8, [heap.address], [heap.address], 4096, heap.address + 32768, heap.address + 40960
    )
    with pytest.raises(ValueError, match="not in the data heap of 4096 bytes"):
        rank.dispatch(0, 16, 16, 0, 0, 0, 0, 0, 8, 0, 0, 8, 0, 0, 0, 4096, 1, True, 1, 0)
