"""What goes wrong: bad calls before anything is launched, absent ranks within the time budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
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
    SequenceError,
    ShapeError,
)
from ep_runtime.normal import Layout, NormalBuffer, virtual_normal_ranks
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


@pytest.fixture
def alone() -> NormalBuffer:
    return virtual_normal_ranks(1, backend="host", **SIZES)[0]


def tokens(rows: int = 4, hidden: int = 256, topk: int = 2) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, hidden).bfloat16(),
        "topk_idx": torch.zeros(rows, topk, dtype=torch.int64),
        "topk_weights": torch.ones(rows, topk),
        "num_experts": EXPERTS,
    }


WRONG_DISPATCHES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 256)}, "x.dtype"),
    ({"x": torch.zeros(4, 2, 128).bfloat16()}, "x.shape"),
    ({"x": torch.zeros(4, 0).bfloat16()}, "x.shape"),
    ({"x": torch.zeros(4, 250).bfloat16()}, "multiple of 16"),
    ({"x": torch.zeros(4, 16392).bfloat16()}, "at most 32768"),
    ({"x": torch.zeros(256, 4).bfloat16().t()}, "stride"),
    ({"x": torch.zeros(4, 260).bfloat16()[:, :256]}, "row stride"),
    ({"x": torch.zeros(4 * 264 + 1).bfloat16()[1:].view(4, 264)[:, :256]}, "data_ptr"),
    ({"x": torch.zeros(4, 256).bfloat16().to("meta")}, "device"),
    ({"x": (torch.zeros(4, 256).to(torch.float8_e4m3fn), torch.zeros(4, 2).half())}, "scales"),
    ({"x": (torch.zeros(4, 256).to(torch.float8_e4m3fn), torch.zeros(3, 2))}, "scales.shape"),
    ({"x": (torch.zeros(4, 256).to(torch.float8_e4m3fn), torch.zeros(4, 0))}, "scales.shape"),
    ({"topk_idx": torch.zeros(4, 2)}, "topk_idx.dtype"),
    ({"topk_idx": torch.zeros(3, 2, dtype=torch.int64)}, "topk_idx.shape"),
    ({"topk_idx": torch.zeros(4, 9, dtype=torch.int64)}, "max_topk=8"),
    ({"topk_idx": torch.zeros(2, 4, dtype=torch.int64).t()}, "contiguous"),
    ({"topk_weights": torch.zeros(4, 3)}, "topk_weights"),
    ({"topk_weights": torch.zeros(4, 2).double()}, "topk_weights.dtype"),
    ({"num_experts": None}, "num_experts"),
    ({"num_experts": 0}, "num_experts"),
    ({"num_experts": 65}, "max_experts=64"),
    ({"expert_alignment": 0}, "expert_alignment"),
    ({"num_worst_tokens": -1}, "num_worst_tokens"),
    ({"num_worst_tokens": 64, "topk_idx": None, "topk_weights": None}, "topk_idx"),
    ({"num_sms": 0}, "num_sms"),
    ({"num_experts": np.int64(EXPERTS)}, "num_experts is int64, it must be an int;"),
    ({"num_experts": True}, "num_experts is bool, it must be an int;"),
    ({"num_experts": torch.tensor(EXPERTS)}, "num_experts is Tensor, it must be an int;"),
    ({"num_worst_tokens": np.int32(64)}, "num_worst_tokens is int32, it must be an int;"),
    ({"num_worst_tokens": False}, "num_worst_tokens is bool, it must be an int;"),
    ({"expert_alignment": 128.0}, "expert_alignment is float, it must be an int;"),
    ({"num_experts": 0}, "at least 1, one per rank; pad it"),
    ({"topk_idx": torch.zeros(4, 9, dtype=torch.int64)}, "larger max_topk"),
    ({"topk_idx": torch.zeros(4, 0, dtype=torch.int64)}, "from 1 to max_topk"),
    ({"x": [[1.0]]}, "x is list, it must be a tensor"),
    ({"x": (torch.zeros(4, 256).bfloat16(),)}, "x is a tuple of 1"),
    ({"x": (torch.zeros(4, 256).to(torch.float8_e4m3fn), 2.0)}, "scales is float"),
    ({"topk_idx": [[0, 1]] * 4}, "topk_idx is list"),
    ({"topk_weights": np.ones((4, 2), np.float32)}, "topk_weights is ndarray"),
    ({"layout": (1, 2, 3)}, "layout is tuple, it must be a Layout"),
    ({"layout": Layout(1, 2, 3), "num_experts": None}, "layout.tokens_per_expert is int"),  # type: ignore[arg-type]
    ({"layout": Layout(1, 2, 3)}, "layout.tokens_per_rank is int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("change", "message"), WRONG_DISPATCHES, ids=lambda v: str(v)[:40])
def test_wrong_dispatches_are_refused_and_launch_nothing(
    alone: NormalBuffer, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        alone.dispatch(**(tokens() | change))
    assert alone.stats.dispatches == 0
    alone.dispatch(**tokens())


def test_too_many_tokens_for_worst_case_mode_are_refused(alone: NormalBuffer) -> None:
    with pytest.raises(ShapeError, match="x has 17 rows, max_tokens=16"):
        alone.dispatch(**tokens(17), num_worst_tokens=64)


def test_wrong_combines_are_refused(alone: NormalBuffer) -> None:
    received = alone.dispatch(**tokens())
    x, handle = received.x, received.handle
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": x.float()}, "x.dtype"),
        ({"x": x[:3]}, "x.shape"),
        ({"topk_weights": torch.zeros(4, 2).half()}, "topk_weights"),
        ({"bias": torch.zeros(4, 128).bfloat16()}, "bias"),
        ({"bias": [torch.zeros(4, 256).bfloat16()] * 3}, "bias"),
        ({"bias": torch.zeros(4, 256)}, "bias"),
        ({"out": torch.zeros(3, 256).bfloat16()}, "out"),
        ({"handle": (1, 2)}, "handle"),
        ({"topk_weights": torch.zeros(3, 2)}, "received row"),
        ({"topk_weights": torch.zeros(4, 9)}, "larger max_topk"),
        ({"topk_weights": 1.0}, "topk_weights is float, it must be a tensor"),
        ({"x": None}, "x is NoneType, it must be a tensor"),
        ({"bias": 1.0}, r"bias\[0\] is float, it must be a tensor"),
        ({"bias": [None]}, r"bias\[0\] is NoneType, it must be a tensor"),
        ({"out": [0.0]}, "out is list, it must be a tensor"),
    ]
    for change, message in wrong:
        with pytest.raises(ShapeError, match=message):
            alone.combine(**({"x": x, "handle": handle} | change))
    other = virtual_normal_ranks(1, backend="host", **SIZES)[0]
    with pytest.raises(ShapeError, match="another NormalBuffer"):
        other.combine(x, handle)
    with pytest.raises(ShapeError, match="x.shape"):
        alone.dispatch_cached(torch.zeros(5, 256).bfloat16(), handle)
    assert alone.stats.combines == 0
    assert torch.equal(alone.combine(x, handle)[0], x)


def test_an_out_over_the_memory_of_what_is_combined_is_refused(alone: NormalBuffer) -> None:
    """Ranks still read it while the sum is written."""
    handle = alone.dispatch(**tokens(2)).handle
    rows = torch.randn(7, 256).bfloat16()
    x = rows[1:6:4]  # rows 1 and 5, and the memory between them
    for out in (rows[0:2], rows[2:4], rows[5:7]):
        with pytest.raises(ShapeError, match="out is at .* apart from x at .* memory of its own"):
            alone.combine(x, handle, out=out)
    held = torch.zeros(6, 256).bfloat16()
    weights = held[3].view(torch.float32)[:16].view(2, 8)
    for out in (held[2:4], held[3:5]):
        with pytest.raises(ShapeError, match="out is at .* apart from topk_weights at .* 64 bytes"):
            alone.combine(x, handle, topk_weights=weights, out=out)
    assert alone.stats.combines == 0

    alone.combine(rows[0:2], handle, out=rows[2:4])  # one begins where the other ends
    assert torch.equal(rows[2:4], rows[0:2])
    for out in (held[1:3], held[4:6]):
        alone.combine(x, handle, topk_weights=weights, out=out)
        assert torch.equal(out, x)


def test_a_layout_counts_no_more_tokens_than_are_dispatched(alone: NormalBuffer) -> None:
    many = torch.zeros((1 << 20) + 1, 1, dtype=torch.int32)
    with pytest.raises(ShapeError, match="topk_idx.*1048577.*at most 1048576.*fewer"):
        alone.layout(many, EXPERTS)
    for wrong in (None, [[0]]):
        with pytest.raises(ShapeError, match="topk_idx is .* it must be a tensor"):
            alone.layout(wrong, EXPERTS)  # type: ignore[arg-type]


def test_rows_alone_go_to_32_ranks_at_most() -> None:
    """The kernel that adds up what comes back lists 32 rows of a token."""
    idx = torch.zeros(4, 2, dtype=torch.int64)
    x = torch.zeros(4, 256).bfloat16()
    small = SIZES | {"max_tokens": 4, "pool_bytes": 0}
    buffers = virtual_normal_ranks(33, backend="host", **small)
    layout = buffers[0].layout(idx, 33)
    with pytest.raises(ShapeError, match="33 ranks.*at most 32 ranks; pass topk_idx"):
        buffers[0].dispatch(x, layout=layout)
    assert buffers[0].stats.dispatches == 0


def test_a_layout_takes_its_place_among_the_operations(
    alone: NormalBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts in device memory that dispatches use, perhaps on another stream. But it frees no
    heap: that waits for the device, and a layout never does."""
    entered, freed = [], []
    monkeypatch.setattr(alone._streams, "enter", lambda: entered.append(None))
    monkeypatch.setattr(alone, "_free_retired", lambda: freed.append(None))
    alone._retired.append(alone._heap)
    alone.layout(torch.zeros(4, 2, dtype=torch.int64), EXPERTS)
    assert len(entered) == 1
    assert not freed
    alone._retired.clear()


def test_a_layout_of_other_tokens_is_refused(alone: NormalBuffer) -> None:
    layout = alone.layout(torch.zeros(5, 2, dtype=torch.int64), EXPERTS)
    with pytest.raises(ShapeError, match="is_token_in_rank"):
        alone.dispatch(**tokens(), layout=layout)
    with pytest.raises(ShapeError, match="tokens_per_expert"):
        alone.dispatch(**(tokens(5) | {"num_experts": 8}), layout=layout)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"max_tokens": (1 << 20) + 1},
        {"max_hidden": 16392},
        {"max_experts": 1025},
        {"max_topk": 33},
        {"pool_bytes": -1},
    ],
    ids=str,
)
def test_configurations_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        virtual_normal_ranks(2, backend="host", **{**SIZES, **change})


def test_a_closed_buffer_says_so(alone: NormalBuffer) -> None:
    alone.close()
    alone.close()
    with pytest.raises(SequenceError, match="closed"):
        alone.dispatch(**tokens())


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
