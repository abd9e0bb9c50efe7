"""The native module's own surface: limits, layout, and the arguments it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_ranks import Ranks, Received, Sizes, random_step

from ep_runtime import _C

GOOD = {
    "num_ranks": 4,
    "num_experts": 16,
    "topk": 4,
    "hidden": 256,
    "max_tokens": 12,
    "num_chains": 2,
    "wire": _C.WIRE_BF16,
}


def test_limits_are_those_of_the_protocol() -> None:
    assert _C.limits() == {
        "max_ranks": 72,
        "max_topk": 32,
        "max_hidden": 16384,
        "max_experts": 1024,
        "max_chains": 8,
        "max_tokens": 8192,
        "hidden_multiple": 128,
    }


def test_a_build_without_cuda_has_no_gpu_names() -> None:
    assert _C.has_cuda == (_C.cuda_archs != "")
    assert _C.has_cuda == hasattr(_C, "CudaRank")


@pytest.mark.parametrize(
    "change",
    [
        {"num_ranks": 0},
        {"num_ranks": 73, "num_experts": 73},
        {"num_experts": 18},
        {"num_experts": 1028},
        {"topk": 0},
        {"topk": 33},
        {"hidden": 0},
        {"hidden": 100},
        {"hidden": 16512},
        {"max_tokens": 0},
        {"max_tokens": 8193},
        {"num_chains": 9},
        {"wire": 3},
        {"wire": -1},
    ],
    ids=str,
)
def test_shapes_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[-1]):
        _C.Shape(**(GOOD | change))


@pytest.mark.parametrize(
    "change",
    [
        {"opaque_row_bytes": 0},
        {"opaque_row_bytes": 8},
        {"opaque_row_bytes": 40},
        {"opaque_row_bytes": 2 * 16384 + 16},
        {"opaque_scales": -1},
        {"opaque_scales": 4097},
    ],
    ids=str,
)
def test_opaque_rows_out_of_range_are_refused(change: dict[str, int]) -> None:
    opaque = {"wire": _C.WIRE_OPAQUE, "opaque_row_bytes": 48, "opaque_scales": 3}
    _C.Shape(**(GOOD | opaque))
    with pytest.raises(ValueError, match=next(iter(change))):
        _C.Shape(**(GOOD | opaque | change))


WIRES = [_C.WIRE_BF16, _C.WIRE_FP8, _C.WIRE_OPAQUE]


@given(
    num_ranks=st.integers(1, 72),
    local_experts=st.integers(1, 14),
    topk=st.integers(1, 32),
    groups=st.integers(1, 128),
    max_tokens=st.integers(1, 8192),
    num_chains=st.integers(1, 8),
    wire=st.sampled_from(WIRES),
    opaque=st.tuples(st.integers(1, 2048), st.integers(0, 4096)),
    combine_wire=st.sampled_from([_C.WIRE_BF16, _C.WIRE_FP8]),
)
def test_layout_holds_everything_in_whole_lines(
    num_ranks: int,
    local_experts: int,
    topk: int,
    groups: int,
    max_tokens: int,
    num_chains: int,
    wire: int,
    opaque: tuple[int, int],
    combine_wire: int,
) -> None:
    hidden = 128 * groups
    shape = _C.Shape(
        num_ranks=num_ranks,
        num_experts=num_ranks * local_experts,
        topk=topk,
        hidden=hidden,
        max_tokens=max_tokens,
        num_chains=num_chains,
        wire=wire,
        opaque_row_bytes=16 * opaque[0] if wire == _C.WIRE_OPAQUE else 0,
        opaque_scales=opaque[1] if wire == _C.WIRE_OPAQUE else 0,
        combine_wire=combine_wire,
    )
    layout = _C.layout(shape)
    row_bytes = [2 * hidden, hidden, 16 * opaque[0]][WIRES.index(wire)]
    scales = [0, groups, opaque[1]][WIRES.index(wire)]
    metadata = 8 + 12 * topk + 4 * scales
    payload = layout["message_bytes"]
    assert payload == -(-metadata // 16) * 16 + row_bytes
    # Lines of 15 granules; the host's tag has room behind the payload.
    lines = -(-payload // 120)
    assert layout["message_lines"] == lines
    assert layout["message_stride"] == 128 * lines >= payload + 8
    # BF16: a line behind every fourteen of data; FP8: eight for every seven groups of channels.
    fp8_lines, bf16_lines = 8 * -(-groups // 7), 2 * groups + -(-2 * groups // 14)
    wide = combine_wire == _C.WIRE_BF16
    assert layout["combine_bytes"] == (2 * hidden if wide else hidden + 4 * groups)
    room = max(fp8_lines, bf16_lines) if wide else fp8_lines  # "bf16" may choose "fp8"
    assert layout["combine_stride"] == 128 * room >= layout["combine_bytes"] + 8
    messages = num_ranks * max_tokens
    assert layout["dispatch_half"] == messages * layout["message_stride"]
    # Two inboxes of each kind, by the parity of the epoch; so many counts and ready lines.
    slots = 2 * messages * (layout["message_stride"] + layout["combine_stride"])
    lines = 2 * num_ranks * (layout["counts_stride"] + 128)
    weights = num_ranks * 128 * -(-4 * max_tokens * topk // 120)
    assert layout["dispatch_offset"] == 128 + lines + weights
    assert layout["heap_bytes"] == 128 + num_chains * (lines + weights + slots)
    # A handle: numbers of messages, slots of what was sent, a row and weight per entry.
    assert layout["routing_bytes"] >= 4 * (num_ranks + messages) + 8 * messages * topk
    last_stats = layout["stats_offset"] + (num_chains - 1) * layout["stats_stride"]
    assert last_stats + layout["stats_bytes"] < layout["local_bytes"]


SHAPE = _C.Shape(**(GOOD | {"wire": _C.WIRE_FP8}))


def target(shape: _C.Shape = SHAPE, **change: int) -> _C.RecvTarget:
    arguments = dict.fromkeys(
        ["x", "scales", "recv_count", "expert_offset", "topk_idx", "topk_weights", "num_messages"],
        128,
    )
    formats = {"format": _C.RECV_BATCHED, "wire": _C.WIRE_FP8, "alignment": 1, "routing": 128}
    formats["num_rows"] = 1
    return _C.RecvTarget(shape, **(formats | arguments | change))


def send_input(shape: _C.Shape = SHAPE, **change: int) -> _C.SendInput:
    good = {"routing": 128, "wire": _C.WIRE_BF16, "x": 128, "x_stride": 512, "topk_idx": 128}
    good |= {"idx_bytes": 8, "weights": 128, "num_tokens": 1}
    return _C.SendInput(shape, **(good | change))


def combine_input(**change: int) -> _C.CombineInput:
    good = {"routing": 128, "y": 128, "y_stride": 256}
    return _C.CombineInput(SHAPE, **(good | change))  # type: ignore[arg-type]


def combine_output(**change: int) -> _C.CombineOutput:
    good = {"routing": 128, "out": 128, "num_tokens": 1}
    return _C.CombineOutput(SHAPE, **(good | change))


@pytest.mark.parametrize("make", [target, send_input, combine_input, combine_output])
@pytest.mark.parametrize("address", [0, 132])
def test_routing_memory_must_be_there_and_aligned(
    make: Callable[..., object], address: int
) -> None:
    with pytest.raises(ValueError, match="routing.*aligned"):
        make(routing=address)


@pytest.mark.parametrize(
    "change", [{"format": 3}, {"format": -1}, {"alignment": 0}, {"alignment": 65537}], ids=str
)
def test_receive_formats_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        target(**change)


def test_addresses_are_never_negative() -> None:
    with pytest.raises(TypeError):
        target(x=-1)


@pytest.mark.parametrize(
    ("recv_format", "missing"),
    [
        (_C.RECV_BATCHED, "x"),
        (_C.RECV_BATCHED, "scales"),
        (_C.RECV_BATCHED, "recv_count"),
        (_C.RECV_BATCHED, "num_messages"),
        (_C.RECV_CONTIGUOUS, "expert_offset"),
        (_C.RECV_COMPACT, "topk_idx"),
        (_C.RECV_COMPACT, "topk_weights"),
    ],
)
def test_a_receive_without_an_array_it_needs_is_refused(recv_format: int, missing: str) -> None:
    group = Ranks(Sizes(fp8=True))
    with pytest.raises(ValueError, match=missing):
        group.ranks[0].dispatch_recv(0, target(format=recv_format, **{missing: 0}))
    assert group.fault(0) is None


def test_opaque_rows_need_the_scales_of_their_shape() -> None:
    change = {"wire": _C.WIRE_OPAQUE, "opaque_row_bytes": 16, "opaque_scales": 2}
    shape = _C.Shape(**(GOOD | change | {"num_ranks": 1}))
    layout = _C.layout(shape)
    sizes = (layout["heap_bytes"], layout["local_bytes"], _C.fault_bytes())
    heap, local, fault = (_C.HostMemory(size) for size in sizes)
    rank = _C.HostRank(shape, 0, [heap.address], local.address, fault.address)
    with pytest.raises(ValueError, match="scales"):
        rank.dispatch_send(0, send_input(shape, wire=_C.WIRE_OPAQUE))
    with pytest.raises(ValueError, match="scales"):
        rank.dispatch_recv(0, target(shape, wire=_C.WIRE_OPAQUE, scales=0))
    assert rank.read_state(0) == (0, 0)


Call = Callable[[Ranks], object]
BAD_CALLS: dict[str, tuple[str, Call]] = {
    "chain too large": ("chain 2", lambda g: g.ranks[0].read_state(2)),
    "negative chain": ("chain -1", lambda g: g.ranks[0].read_stats(-1)),
    "chain of a receive": ("chain 2", lambda g: g.ranks[0].dispatch_recv(2, target())),
    "too many tokens": ("num_tokens 13", lambda g: g.dispatch_send(0, random_step(g.sizes, 13))),
    "too many rows back": (
        "num_tokens 13",
        lambda g: g.ranks[0].combine_recv(0, combine_output(num_tokens=13)),
    ),
    "too many weights": (
        "num_tokens 13",
        lambda g: g.ranks[0].combine_send(0, combine_input(num_tokens=13)),
    ),
    "index width": (
        "idx_bytes",
        lambda g: g.dispatch_send(0, random_step(g.sizes, 1, torch.int16)),
    ),
    "null rows": ("null", lambda g: g.ranks[0].dispatch_send(0, send_input(x=0))),
    "null answers": ("y", lambda g: g.ranks[0].combine_send(0, combine_input(y=0))),
    "null result": ("out", lambda g: g.ranks[0].combine_recv(0, combine_output(out=0))),
    "negative stride": (
        "stride",
        lambda g: g.ranks[0].combine_send(0, combine_input(y_stride=-1)),
    ),
    "negative row stride": (
        "stride",
        lambda g: g.ranks[0].dispatch_send(0, send_input(x_stride=-1)),
    ),
    "late weights missing": (
        "weights",
        lambda g: g.ranks[0].combine_send(0, combine_input(late_weights=True, num_tokens=1)),
    ),
    "rows of another wire format": (
        "wire",
        lambda g: g.ranks[0].dispatch_send(0, send_input(wire=_C.WIRE_OPAQUE)),
    ),
    "received in another wire format": (
        "wire",
        lambda g: g.ranks[0].dispatch_recv(0, target(wire=_C.WIRE_OPAQUE)),
    ),
    "no budget": ("budget", lambda g: g.ranks[0].set_time_budget(0)),
    "null fault board": ("null", lambda _: _C.read_fault(0)),
}


@pytest.mark.parametrize(("message", "call"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_arguments_that_no_shape_allows_are_refused(message: str, call: Call) -> None:
    group = Ranks(Sizes())
    with pytest.raises(ValueError, match=message):
        call(group)
    assert group.fault(0) is None
    assert group.ranks[0].read_state(0) == (0, 0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("rank 4", {"rank": 4}),
        ("rank -1", {"rank": -1}),
        ("3 heaps", {"heaps": [128, 256, 384]}),
        ("heap of rank 2.*aligned", {"heaps": [128, 256, 392, 512]}),
        ("heap of rank 0.*null", {"heaps": [0, 128, 256, 384]}),
        ("local", {"local": 0}),
        ("fault", {"fault": 4}),
    ],
)
def test_ranks_without_a_place_are_refused(message: str, change: dict[str, object]) -> None:
    group = Ranks(Sizes())
    good = {
        "shape": group.shape,
        "rank": 0,
        "heaps": [heap.address for heap in group.heaps],
        "local": group.locals[0].address,
        "fault": group.faults[0].address,
    }
    with pytest.raises(ValueError, match=message):
        _C.HostRank(**(good | change))  # type: ignore[arg-type]


def test_a_batched_receive_needs_only_its_own_arrays() -> None:
    sizes = Sizes(num_ranks=1, num_experts=2, topk=1)
    group = Ranks(sizes)
    group.dispatch_send(0, random_step(sizes, 3))
    received = Received(sizes, _C.RECV_BATCHED)
    group.ranks[0].dispatch_recv(0, received.target(group.shape, group.routing[0][0]))
    assert bool((received.expert_offset == -7).all())
    assert bool((received.topk_idx == -7).all())
