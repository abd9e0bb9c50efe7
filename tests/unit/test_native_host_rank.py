"""Host ranks: dispatch is torch's bit for bit, combine is float64's up to bf16 rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from native_ranks import (
    FORMATS,
    Arrival,
    Ranks,
    Received,
    Sizes,
    Step,
    arrivals,
    expected_combine,
    random_step,
    wire_rows,
)
from torch import Tensor

from ep_runtime import _C

formats = pytest.mark.parametrize("recv_format", FORMATS.values(), ids=FORMATS.keys())
wires = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])


def row_numbers(received: Received, found: Sequence[Arrival]) -> dict[tuple[int, int], int]:
    """Row of each (arrival, local expert); a compact row counts as expert -1."""
    sizes = received.sizes
    rows: dict[tuple[int, int], int] = {}
    if received.recv_format == _C.RECV_COMPACT:
        return {(i, -1): i for i in range(len(found))}
    offset = 0
    for x in range(sizes.num_local_experts):
        batched = received.recv_format == _C.RECV_BATCHED
        first = x * sizes.num_ranks * sizes.max_tokens if batched else offset
        mine = [i for i, a in enumerate(found) if x in [expert for _, expert in a.entries]]
        rows |= {(i, x): first + n for n, i in enumerate(mine)}
        offset += -(-len(mine) // received.alignment) * received.alignment
    return rows


def check_received(received: Received, steps: Sequence[Step], rank: int) -> None:
    sizes = received.sizes
    found = arrivals(sizes, steps, rank)
    per_expert = [0] * sizes.num_local_experts
    per_source = [0] * sizes.num_ranks
    for arrival in found:
        per_source[arrival.source] += 1
        for _, x in arrival.entries:
            per_expert[x] += 1
    assert received.recv_count.tolist() == per_expert
    assert received.num_messages.tolist() == per_source

    want, want_scales = torch.full_like(received.x, 0xAB), torch.full_like(received.scales, -7.0)
    wire = [wire_rows(sizes, step.x) for step in steps]
    for (i, _), row in row_numbers(received, found).items():
        values, scales = wire[found[i].source]
        want[row] = values[found[i].token]
        if scales is not None:
            want_scales[row] = scales[found[i].token]
    assert torch.equal(received.x, want)  # rows beyond the counts still hold the poison
    assert torch.equal(received.scales, want_scales)
    if received.recv_format == _C.RECV_CONTIGUOUS:
        aligned = torch.tensor(
            [-(-n // received.alignment) * received.alignment for n in per_expert]
        )
        assert received.expert_offset.tolist() == [0, *aligned.cumsum(0).tolist()]
    if received.recv_format == _C.RECV_COMPACT:
        check_choices(received, steps, found)


def check_choices(received: Received, steps: Sequence[Step], found: Sequence[Arrival]) -> None:
    want_idx = torch.full_like(received.topk_idx, -1)
    want_weights = torch.zeros_like(received.topk_weights)
    for i, arrival in enumerate(found):
        for k, x in arrival.entries:
            want_idx[i, k] = x
            want_weights[i, k] = steps[arrival.source].weights[arrival.token, k]
    assert torch.equal(received.topk_idx, want_idx)
    assert torch.equal(received.topk_weights[: len(found)], want_weights[: len(found)])


def answers(
    received: Received, steps: Sequence[Step], rank: int, expert: Sequence[float]
) -> Tensor:
    """What the experts answer, rows placed as received: expert e makes x * expert[e].

    A compact row is reduced and weighted already. Rows that are nobody's are NaN.
    """
    sizes = received.sizes
    y = torch.full((received.x.shape[0], sizes.hidden), torch.nan, dtype=torch.bfloat16)
    found = arrivals(sizes, steps, rank)
    first = rank * sizes.num_local_experts
    for (i, x), row in row_numbers(received, found).items():
        arrival = found[i]
        source = steps[arrival.source]
        token = source.x[arrival.token]
        if x >= 0:
            y[row] = token * torch.tensor(expert[first + x]).bfloat16()
            continue
        weighted = [
            (token * torch.tensor(expert[first + local]).bfloat16()).double()
            * source.weights[arrival.token, k].double()
            for k, local in arrival.entries
        ]
        y[row] = torch.stack(weighted).sum(0).to(torch.bfloat16)
    return y


def check_pair(
    group: Ranks, steps: Sequence[Step], recv_format: int, chain: int = 0
) -> list[Tensor]:
    """One dispatch and its combine, both checked."""
    sizes = group.sizes
    expert = torch.randn(sizes.num_experts).bfloat16().tolist()
    received = group.dispatch(steps, chain, recv_format)
    for rank, got in enumerate(received):
        check_received(got, steps, rank)
    ys = [answers(got, steps, rank, expert) for rank, got in enumerate(received)]
    outs = group.combine(steps, ys, chain)
    for source, out in enumerate(outs):
        want, slack = expected_combine(steps, expert, source)
        assert bool(((out.double() - want).abs() <= slack).all())
    assert [group.fault(r) for r in range(sizes.num_ranks)] == [None] * sizes.num_ranks
    return outs


@wires
@formats
def test_pairs_of_any_number_of_tokens(recv_format: int, fp8: bool) -> None:
    sizes = Sizes(fp8=fp8)
    group = Ranks(sizes)
    for tokens in ([12, 12, 12, 12], [0, 0, 0, 0], [1, 12, 0, 5], [0, 0, 7, 0], [3, 3, 3, 3]):
        check_pair(group, [random_step(sizes, t) for t in tokens], recv_format)
    assert [rank.read_state(0) for rank in group.ranks] == [(5, 5)] * 4


@formats
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(num_ranks=1, num_experts=5, topk=3, hidden=128),
        Sizes(num_ranks=2, num_experts=1024, topk=32, hidden=128, max_tokens=6),
        Sizes(num_ranks=4, num_experts=4, topk=1, hidden=384),
        Sizes(num_ranks=2, num_experts=4, topk=4, hidden=16384, max_tokens=3, fp8=True),
        Sizes(num_ranks=72, num_experts=72, topk=8, hidden=128, max_tokens=2, num_chains=1),
    ],
    ids=lambda s: f"R{s.num_ranks}-E{s.num_experts}-K{s.topk}-H{s.hidden}",
)
def test_the_limits_of_every_size(recv_format: int, sizes: Sizes) -> None:
    group = Ranks(sizes)
    for _ in range(3):
        steps = [random_step(sizes, sizes.max_tokens) for _ in range(sizes.num_ranks)]
        check_pair(group, steps, recv_format)


@formats
def test_rows_from_num_tokens_on_are_never_sent_and_come_back_zero(recv_format: int) -> None:
    sizes = Sizes()
    group = Ranks(sizes)
    for real in ([5, 0, 12, 1], [-3, 99, 2, 8]):  # clamped to 0..T
        steps = [random_step(sizes, t) for t in (12, 4, 12, 8)]
        for step, n in zip(steps, real, strict=True):
            step.num_tokens = torch.tensor(n, dtype=torch.int32)
        outs = check_pair(group, steps, recv_format)
        assert all(not out[step.num_real :].any() for out, step in zip(outs, steps, strict=True))


def test_int32_experts_and_rows_with_a_stride() -> None:
    sizes = Sizes()
    steps = [random_step(sizes, 9, torch.int32) for _ in range(4)]
    for step in steps:
        step.x = torch.cat([step.x, torch.full_like(step.x, torch.nan)], 1)[:, : sizes.hidden]
        assert not step.x.is_contiguous()
    check_pair(Ranks(sizes), steps, _C.RECV_BATCHED)


def test_answers_with_a_stride() -> None:
    sizes = Sizes()
    group = Ranks(sizes)
    steps = [random_step(sizes, 6) for _ in range(4)]
    expert = [1.0] * sizes.num_experts
    ys = [answers(got, steps, r, expert) for r, got in enumerate(group.dispatch(steps))]
    wide = [torch.cat([y, torch.full_like(y, torch.nan)], 1)[:, : sizes.hidden] for y in ys]
    for source, out in enumerate(group.combine(steps, wide)):
        want, slack = expected_combine(steps, expert, source)
        assert bool(((out.double() - want).abs() <= slack).all())


def test_tokens_without_expert_are_not_sent_and_come_back_zero() -> None:
    sizes = Sizes()
    group = Ranks(sizes)
    steps = [random_step(sizes, 8) for _ in range(4)]
    for step in steps:
        step.topk_idx.fill_(-1)
    outs = check_pair(group, steps, _C.RECV_BATCHED)
    assert all(not out.any() for out in outs)
    assert group.ranks[0].read_stats(0)["messages_sent"] == 0
    assert group.routing_fault(0) is None  # -1 is no fault


def test_chains_do_not_touch_each_other() -> None:
    sizes = Sizes()
    group = Ranks(sizes)
    first, second = ([random_step(sizes, 12) for _ in range(4)] for _ in range(2))
    expert = torch.randn(sizes.num_experts).bfloat16().tolist()
    waiting = group.dispatch(first, chain=0)
    for _ in range(3):
        check_pair(group, second, _C.RECV_COMPACT, chain=1)
    ys = [answers(got, first, rank, expert) for rank, got in enumerate(waiting)]
    for source, out in enumerate(group.combine(first, ys, chain=0)):
        want, slack = expected_combine(first, expert, source)
        assert bool(((out.double() - want).abs() <= slack).all())
    assert group.ranks[0].read_state(0) == (1, 1)
    assert group.ranks[0].read_state(1) == (3, 3)


@wires
@formats
def test_dispatches_and_combines_need_not_alternate(recv_format: int, fp8: bool) -> None:
    """On one chain; each combine is of the dispatch that its handle names."""
    sizes = Sizes(fp8=fp8)
    group = Ranks(sizes)
    steps, routing, received = [], [], []
    for operation in ("D", "D", "D", 2, 0, "D", 1, 3, 0):
        if operation == "D":
            steps.append([random_step(sizes, t) for t in torch.randint(0, 13, (4,)).tolist()])
            routing.append(group.new_routing())
            received.append(group.dispatch(steps[-1], 0, recv_format, routing[-1]))
            for rank, got in enumerate(received[-1]):
                check_received(got, steps[-1], rank)
            continue
        which = int(operation)
        expert = torch.randn(sizes.num_experts).bfloat16().tolist()
        ys = [answers(got, steps[which], r, expert) for r, got in enumerate(received[which])]
        outs = group.combine(steps[which], ys, 0, routing[which])
        for source, out in enumerate(outs):
            want, slack = expected_combine(steps[which], expert, source)
            assert bool(((out.double() - want).abs() <= slack).all())
    assert [rank.read_state(0) for rank in group.ranks] == [(4, 5)] * 4
    assert [group.fault(r) for r in range(4)] == [None] * 4


def test_the_same_input_gives_the_same_bits() -> None:
    sizes = Sizes()
    group = Ranks(sizes)
    steps = [random_step(sizes, 12) for _ in range(4)]
    torch.manual_seed(5)
    once = check_pair(group, steps, _C.RECV_BATCHED)
    torch.manual_seed(5)
    twice = check_pair(group, steps, _C.RECV_BATCHED)
    torch.manual_seed(5)
    sorted_rows = check_pair(group, steps, _C.RECV_CONTIGUOUS)
    for a, b, c in zip(once, twice, sorted_rows, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@wires
def test_statistics_add_up_until_they_are_zeroed(fp8: bool) -> None:
    sizes = replace(Sizes(), fp8=fp8)
    group = Ranks(sizes)
    steps = [random_step(sizes, 10) for _ in range(4)]
    for _ in range(3):
        check_pair(group, steps, _C.RECV_BATCHED)
    found = [arrivals(sizes, steps, rank) for rank in range(4)]
    for rank in range(4):
        stats = group.ranks[rank].read_stats(0)
        assert stats.pop("wait_ns") == [0] * _C.limits()["max_ranks"]  # all had sent before
        sent = 3 * sum(a.source == rank for list_ in found for a in list_)
        received = 3 * len(found[rank])
        assert stats == {
            "messages_sent": sent,
            "messages_received": received,
            "rows_received": 3 * sum(len(a.entries) for a in found[rank]),
            "bytes_dispatched": sent * group.layout["message_bytes"],
            "bytes_combined": received * 2 * sizes.hidden,
        }
    group.reset()
    stats = group.ranks[0].read_stats(0)
    assert set(stats.pop("wait_ns")) == {0}
    assert set(stats.values()) == {0}
