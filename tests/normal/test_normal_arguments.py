"""Bad calls are refused before anything is launched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ep_runtime import ConfigError, SequenceError, ShapeError
from ep_runtime.normal import Layout, NormalBuffer, virtual_normal_ranks

EXPERTS = 16
SIZES = {"max_tokens": 16, "max_hidden": 256, "max_experts": 64, "max_topk": 8}


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


def test_an_out_beside_a_bias_in_the_same_memory_is_refused(alone: NormalBuffer) -> None:
    """A bias in the very place of out is read before it is written; row by row another is not."""
    received = alone.dispatch(**tokens(2))
    held = torch.arange(3.0)[:, None].expand(3, 256).bfloat16().contiguous()
    wanted = alone.combine(received.x, received.handle, bias=held[:2].clone())[0]
    for bias in (held[:2], [torch.zeros(2, 256).bfloat16(), held[:2]]):
        with pytest.raises(ShapeError, match="out is at .* apart from bias at"):
            alone.combine(received.x, received.handle, bias=bias, out=held[1:])
    assert torch.equal(
        alone.combine(received.x, received.handle, bias=held[:2], out=held[:2])[0], wanted
    )


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
