"""Faults of host ranks: who is blamed, who is told, and that nobody hangs or runs on."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from native_ranks import Ranks, Sizes, Step, random_step

from ep_runtime import _C

NO_EXPERT = 2**40


def all_send(group: Ranks) -> list[Step]:
    steps = [random_step(group.sizes, 6) for _ in range(group.sizes.num_ranks)]
    for step in steps:  # everybody sends something to everybody
        step.topk_idx[0] = torch.arange(group.sizes.num_ranks) * group.sizes.num_local_experts
    for rank, step in enumerate(steps):
        group.dispatch_send(rank, step)
    return steps


def as_tuple(fault: _C.Fault | None) -> tuple[int, ...] | None:
    """(code, op, chain, rank, peer)."""
    if fault is None:
        return None
    return (fault.code, fault.op, fault.chain, fault.rank, fault.peer)


def assert_works(group: Ranks, first: tuple[int, int] = (0, 0)) -> None:
    """A whole pair runs, by the counts it leaves."""
    steps = all_send(group)
    received = [group.dispatch_recv(r) for r in range(group.sizes.num_ranks)]
    width = group.sizes.hidden
    ys = [r.x.view(torch.bfloat16).view(-1, width) for r in received]
    outs = group.combine(steps, ys)
    assert all(bool(out.isfinite().all()) for out in outs)
    for rank in range(group.sizes.num_ranks):
        assert group.fault(rank) is None
        assert group.ranks[rank].read_state(0) == (first[0] + 1, first[1] + 1)


def test_bad_experts_are_dropped_counted_and_not_fatal() -> None:
    group = Ranks(Sizes())
    steps = [random_step(group.sizes, 4) for _ in range(4)]
    steps[1].topk_idx[:] = torch.tensor(
        [[3, 3, NO_EXPERT, -1], [0, 1, 2, 3], [16, 4, -2, 4], [-1, -1, -1, -1]]
    )
    received = group.dispatch(steps)
    fault = group.routing_fault(1)
    assert as_tuple(fault) == (_C.FAULT_ROUTING, _C.OP_DISPATCH, 0, 1, -1)
    assert fault is not None
    assert (fault.count, fault.expected, fault.seen) == (5, 16, 3)  # 3 twice is seen first
    assert [group.routing_fault(r) for r in (0, 2, 3)] == [None] * 3
    assert group.fault(1) is None
    assert received[0].num_messages[1] == 2  # tokens 0 and 1
    assert received[1].num_messages[1] == 1  # token 2, once, for expert 4
    assert received[3].num_messages[1] == 0


def test_routing_faults_add_up_and_are_cleared() -> None:
    sizes = Sizes(num_ranks=1, num_experts=4, topk=1)
    group = Ranks(sizes)
    for bad in (-5, 9):
        step = Step(torch.ones(1, 256).bfloat16(), torch.tensor([[bad]]), torch.ones(1, 1))
        group.dispatch([step])
        y = torch.zeros(1, 256, dtype=torch.bfloat16)
        assert not group.combine([step], [y])[0].any()
    fault = group.routing_fault(0)
    assert fault is not None
    assert (fault.count, fault.seen) == (2, 2**64 - 5)  # the first one, as two's complement
    _C.clear_faults(group.faults[0].address)
    assert group.routing_fault(0) is None


def test_an_absent_peer_is_named_within_the_budget() -> None:
    group = Ranks(Sizes(), budget_seconds=0.2)
    for rank in (0, 1, 3):
        group.dispatch_send(rank, random_step(group.sizes, 3))
    start = time.monotonic()
    group.dispatch_recv(1)
    assert 0.2 <= time.monotonic() - start < 5.0
    fault = group.fault(1)
    assert as_tuple(fault) == (_C.FAULT_TIMEOUT, _C.OP_DISPATCH, 0, 1, 2)
    assert fault is not None
    assert (fault.expected, fault.seen) == (1, 0)
    assert group.ranks[1].read_state(0) == (0, 0)


def test_others_learn_who_was_missing_and_do_nothing_until_reset() -> None:
    group = Ranks(Sizes(), budget_seconds=0.05)
    for rank in (0, 1, 3):
        group.dispatch_send(rank, random_step(group.sizes, 3))
    group.dispatch_recv(1)
    start = time.monotonic()
    for rank in (0, 2, 3):
        group.dispatch_send(rank, random_step(group.sizes, 3), chain=1)
        received = group.dispatch_recv(rank)
        assert bool((received.recv_count == -7).all())
        assert as_tuple(group.fault(rank)) == (_C.FAULT_ABORTED, _C.OP_DISPATCH, 1, 1, 2)
    assert time.monotonic() - start < 5.0
    group.reset()
    assert_works(group)


def test_a_wait_ends_when_a_peer_gives_up() -> None:
    group = Ranks(Sizes(num_chains=1), budget_seconds=100.0)
    for rank in (0, 1, 3):
        group.dispatch_send(rank, random_step(group.sizes, 3))
    waiting = threading.Thread(target=group.dispatch_recv, args=(0,))
    waiting.start()
    group.ranks[3].set_time_budget(1_000_000)
    group.dispatch_recv(3)
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert as_tuple(group.fault(0)) == (_C.FAULT_ABORTED, _C.OP_DISPATCH, 0, 3, 2)


def test_a_late_peer_is_waited_for_without_the_gil() -> None:
    group = Ranks(Sizes(), budget_seconds=30.0)
    steps = [random_step(group.sizes, 6) for _ in range(4)]
    for rank in (0, 1, 3):
        group.dispatch_send(rank, steps[rank])
    waiting = threading.Thread(target=group.dispatch_recv, args=(0,))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    group.dispatch_send(2, steps[2])
    waiting.join(timeout=10)
    assert group.fault(0) is None
    assert group.ranks[0].read_state(0) == (1, 0)
    wait_ns = group.ranks[0].read_stats(0)["wait_ns"]
    assert 20_000_000 < wait_ns[2] < 10_000_000_000
    assert not any(wait_ns[:2] + wait_ns[3:])


def test_a_rank_that_does_not_combine_is_named() -> None:
    group = Ranks(Sizes(), budget_seconds=0.05)
    steps = all_send(group)
    received = [group.dispatch_recv(r) for r in range(4)]
    for rank in (0, 1, 2):
        group.combine_send(rank, received[rank].x.view(torch.bfloat16))
    group.combine_recv(0, steps[0])
    assert as_tuple(group.fault(0)) == (_C.FAULT_TIMEOUT, _C.OP_COMBINE, 0, 0, 3)
    assert group.ranks[0].read_state(0) == (1, 0)


def test_a_rank_is_missed_in_a_combine_that_needs_no_row_of_it() -> None:
    """Nobody runs ahead of a rank that sent nothing and is sent nothing."""
    group = Ranks(Sizes(), budget_seconds=0.05)
    steps = [random_step(group.sizes, 0) for _ in range(4)]
    group.dispatch(steps)
    nothing = torch.empty(1, group.sizes.hidden, dtype=torch.bfloat16)
    for rank in (0, 1, 3):
        group.combine_send(rank, nothing)
    group.combine_recv(1, steps[1])
    assert as_tuple(group.fault(1)) == (_C.FAULT_TIMEOUT, _C.OP_COMBINE, 0, 1, 2)


@pytest.mark.parametrize("op", [_C.OP_DISPATCH, _C.OP_COMBINE], ids=["dispatch", "combine"])
def test_a_receive_without_its_send_ends(op: int) -> None:
    group = Ranks(Sizes(), budget_seconds=0.05)
    assert_works(group)
    if op == _C.OP_DISPATCH:
        group.dispatch_recv(2)
    else:
        group.combine_recv(2, random_step(group.sizes, 2))
    fault = group.fault(2)
    assert as_tuple(fault) == (_C.FAULT_TIMEOUT, op, 0, 2, 0)
    assert fault is not None
    assert (fault.expected, fault.seen) == (2, 0)
    assert group.ranks[2].read_state(0) == (1, 1)
    group.dispatch_send(0, random_step(group.sizes, 1), chain=1)  # everybody has been told
    assert as_tuple(group.fault(0)) == (_C.FAULT_ABORTED, _C.OP_DISPATCH, 1, 2, 0)
    group.reset()
    assert_works(group)


def test_a_dispatch_needs_no_combine_before_it() -> None:
    group = Ranks(Sizes())
    for epoch in range(1, 5):
        steps = all_send(group)
        for rank in range(4):
            assert group.dispatch_recv(rank).num_messages[rank] > 0
            assert group.ranks[rank].read_state(0) == (epoch, 0)
    ys = [torch.ones(4 * 48, group.sizes.hidden, dtype=torch.bfloat16) for _ in range(4)]
    for epoch in range(1, 4):  # nor a combine a dispatch
        for out, step in zip(group.combine(steps, ys), steps, strict=True):
            weights = torch.where(step.topk_idx >= 0, step.weights, 0.0).double().sum(1)
            assert bool(((out[:, 0].double() - weights).abs() <= 0.1).all())
        assert [rank.read_state(0) for rank in group.ranks] == [(4, epoch)] * 4
    assert [group.fault(rank) for rank in range(4)] == [None] * 4
    assert_works(group, first=(4, 3))


def test_a_tag_from_the_future_is_a_desync() -> None:
    group = Ranks(Sizes())
    all_send(group)
    tag = group.counts_offset(1, source=2) + group.layout["counts_stride"] - 8
    assert group.word(0, tag).value == 1
    group.word(0, tag).value = 7
    group.dispatch_recv(0)
    fault = group.fault(0)
    assert as_tuple(fault) == (_C.FAULT_DESYNC, _C.OP_DISPATCH, 0, 0, 2)
    assert fault is not None
    assert (fault.expected, fault.seen) == (1, 7)


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        pytest.param(0, 13, 12, id="more messages than the inbox holds"),
        pytest.param(0, 2**32 - 1, 12, id="a negative number of messages"),
        pytest.param(3, 7, None, id="more rows for an expert than messages"),
    ],
)
def test_counts_beyond_the_inbox_are_not_believed(
    word: int, value: int, expected: int | None
) -> None:
    group = Ranks(Sizes())
    all_send(group)
    offset = group.counts_offset(1, source=3)
    messages = group.word(1, offset).value
    assert messages <= 6
    group.word(1, offset + 4 * word).value = value
    received = group.dispatch_recv(1)
    fault = group.fault(1)
    assert as_tuple(fault) == (_C.FAULT_COUNT, _C.OP_DISPATCH, 0, 1, 3)
    assert fault is not None
    assert (fault.expected, fault.seen) == (messages if expected is None else expected, value)
    assert bool((received.x == 0xAB).all())


@pytest.mark.parametrize("position", [2**20, 2**32 - 1], ids=["beyond", "negative"])
def test_positions_beyond_the_counts_are_not_believed(position: int) -> None:
    group = Ranks(Sizes())
    all_send(group)
    offset = group.message_offset(1, source=2, slot=0) + 8  # behind the header
    assert group.word(0, offset).value == 0  # entry 0: expert 0, which is rank 0's
    group.word(0, offset + 4).value = position
    group.dispatch_recv(0)
    assert as_tuple(group.fault(0)) == (_C.FAULT_COUNT, _C.OP_DISPATCH, 0, 0, 2)


@pytest.mark.parametrize("inbox", ["dispatch", "combine"])
def test_a_tag_two_epochs_ahead_is_a_desync_in_either_inbox(inbox: str) -> None:
    """What a rank that had run ahead would leave in the inbox of the same parity."""
    group = Ranks(Sizes())
    steps = all_send(group)
    received = [group.dispatch_recv(rank) for rank in range(4)]
    if inbox == "dispatch":
        all_send(group)
        tag = group.message_offset(2, source=3, slot=0) + group.layout["message_stride"] - 8
        assert group.word(1, tag).value == 2
        group.word(1, tag).value = 4
        group.dispatch_recv(1)
        op, expected = _C.OP_DISPATCH, 2
    else:
        for rank, got in enumerate(received):
            group.combine_send(rank, got.x.view(torch.bfloat16))
        tag = group.ready_offset(1, source=3) + 120
        assert group.word(1, tag).value == 1
        group.word(1, tag).value = 3
        group.combine_recv(1, steps[1])
        op, expected = _C.OP_COMBINE, 1
    fault = group.fault(1)
    assert as_tuple(fault) == (_C.FAULT_DESYNC, op, 0, 1, 3)
    assert fault is not None
    assert (fault.expected, fault.seen) == (expected, expected + 2)


def test_the_first_fatal_fault_stays() -> None:
    group = Ranks(Sizes(), budget_seconds=0.01)
    group.dispatch_recv(0)
    first = as_tuple(group.fault(0))
    assert first == (_C.FAULT_TIMEOUT, _C.OP_DISPATCH, 0, 0, 0)  # it had not sent to itself
    group.dispatch_recv(0, chain=1)
    assert as_tuple(group.fault(0)) == first


def test_reset_keeps_the_budget() -> None:
    group = Ranks(Sizes(), budget_seconds=0.02)
    group.reset()
    start = time.monotonic()
    group.dispatch_recv(0)
    assert time.monotonic() - start < 5.0
    assert as_tuple(group.fault(0)) == (_C.FAULT_TIMEOUT, _C.OP_DISPATCH, 0, 0, 0)
