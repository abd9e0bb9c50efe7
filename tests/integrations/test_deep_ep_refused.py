"""What DeepEP's interface refuses: by name, before anything is sent, and good calls follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import Format, combine, dispatch, open_buffer
from traffic import Sizes

from ep_runtime.errors import ConfigError, EpError, SequenceError, ShapeError
from ep_runtime.integrations.deep_ep import Buffer

SIZES = Sizes(num_experts=8, topk=2, hidden=512, max_tokens=8)


def refused_constructions(rank: Rank) -> None:
    for arguments, text in (
        ({"num_nvl_bytes": 100}, "num_nvl_bytes=100"),
        ({"num_nvl_bytes": None}, "num_nvl_bytes=None"),
        ({"num_nvl_bytes": float("nan")}, "num_nvl_bytes=nan"),
        ({"num_rdma_bytes": -128}, "num_rdma_bytes=-128"),
        ({"num_nvl_bytes": 2**31, "num_rdma_bytes": 128}, str(2**31)),
        ({"num_qps_per_rank": 0, "low_latency_mode": True}, "num_qps_per_rank=0"),
    ):
        with pytest.raises(ConfigError, match=text):
            Buffer(rank.group, **arguments)
    with pytest.raises(ConfigError, match="group=None"):
        Buffer(None)
    Buffer(rank.group, num_qps_per_rank=0)  # only low-latency calls have queue pairs
    with pytest.raises(SequenceError, match="explicitly_destroy"):
        Buffer(rank.group).destroy()


def test_constructions_that_deep_ep_refuses(pair: RankPool) -> None:
    pair.run(refused_constructions)


def refused_low_latency(rank: Rank, seed: int) -> None:
    """Each raises before anything is sent: a good round trip follows on the same Buffer."""
    buffer = open_buffer(rank, SIZES)
    good = dispatch(rank, buffer, SIZES, seed, Format(), "plain")
    x = torch.zeros((4, 512), dtype=torch.bfloat16, device=rank.device)
    idx = torch.zeros((4, 2), dtype=torch.int64, device=rank.device)
    idx[:, 1] = 1
    y = torch.zeros_like(good.received)

    def send(kind: type[EpError], text: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            buffer.low_latency_dispatch(*arguments, **options)

    def back(kind: type[EpError], text: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            buffer.low_latency_combine(*arguments, **options)

    send(ShapeError, "dtype", x.float(), idx, 8, 8)
    send(ShapeError, "dtype", x, idx.float(), 8, 8)
    send(ShapeError, "topk_idx.*3", x, idx[:3], 8, 8)
    send(ShapeError, "x is", x[0], idx, 8, 8)
    send(ShapeError, "9 rows", x.repeat(3, 1)[:9], idx.repeat(3, 1)[:9], 8, 8)
    send(ShapeError, "x is NoneType, it must be a tensor", None, idx, 8, 8)
    send(ShapeError, "topk_idx is list, it must be a tensor", x, [[0, 1]], 8, 8)
    send(ConfigError, "num_experts=7", x, idx, 8, 7)
    send(ConfigError, "max_tokens=0", x, idx, 0, 8)
    send(ConfigError, "use_ue8m0", x, idx, 8, 8, use_ue8m0=True)
    send(SequenceError, "async_finish", x, idx, 8, 8, async_finish=True, return_recv_hook=True)
    wrong_stats = torch.zeros(3, dtype=torch.int32, device=rank.device)
    send(ShapeError, "3", x, idx, 8, 8, cumulative_local_expert_recv_stats=wrong_stats)
    send(ShapeError, "int64", x, idx, 8, 8, dispatch_wait_recv_cost_stats=wrong_stats)
    own, handle = good.own, good.handle
    weights = own.weights
    back(ShapeError, "dtype", y.float(), own.topk_idx, weights, handle)
    back(ShapeError, "y.shape", y[:, 1:], own.topk_idx, weights, handle)
    back(ShapeError, "handle", y, own.topk_idx, weights, tuple(handle))
    back(ShapeError, "y is of type NoneType", None, own.topk_idx, weights, handle)
    back(ShapeError, "topk_weights is NoneType", y, own.topk_idx, None, handle)
    back(ShapeError, "out is of type list", y, own.topk_idx, weights, handle, out=[y])
    other = open_buffer(rank, SIZES)
    with pytest.raises(SequenceError, match="made by another Buffer"):
        other.low_latency_combine(y, own.topk_idx, weights, handle)
    with pytest.raises(SequenceError, match="made by another Buffer"):
        other.get_next_low_latency_combine_buffer(handle)
    other.destroy()
    back(ShapeError, "topk_weights", y, own.topk_idx, weights[:, :1], handle)
    back(ShapeError, "float32", y, own.topk_idx, weights.double(), handle)
    back(ConfigError, "logfmt", y, own.topk_idx, weights, handle, use_logfmt=True, zero_copy=True)
    back(SequenceError, "get_next", y, own.topk_idx, weights, handle, zero_copy=True)
    bad_out = torch.zeros((len(own.x) + 1, 512), dtype=torch.bfloat16, device=rank.device)
    back(ShapeError, "out", y, own.topk_idx, weights, handle, out=bad_out)
    combine(rank, buffer, good)
    send(ConfigError, "max_tokens=", x, idx, float(SIZES.max_tokens), SIZES.num_experts)
    _, _, unreceived, _, hook = buffer.low_latency_dispatch(x, idx, 8, 8, return_recv_hook=True)
    weights = torch.ones((4, 2), device=rank.device)
    back(SequenceError, "hook", y, idx, weights, unreceived)
    send(SequenceError, "wait", x, idx, 8, 8)
    assert hook is not None
    hook()
    with pytest.raises(SequenceError):
        hook()
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed + 1, Format(True), "hook"))
    buffer.destroy()
    with pytest.raises(SequenceError, match="destroyed"):
        buffer.low_latency_dispatch(x, idx, 8, 8)


def test_low_latency_calls_that_are_refused(pool: RankPool, seed: int) -> None:
    pool.run(refused_low_latency, seed)


def refused_without_mode(rank: Rank) -> None:
    buffer = Buffer(rank.group, explicitly_destroy=True)
    x = torch.zeros((4, 512), dtype=torch.bfloat16, device=rank.device)
    idx = torch.zeros((4, 2), dtype=torch.int64, device=rank.device)
    with pytest.raises(SequenceError, match="low_latency_mode"):
        buffer.low_latency_dispatch(x, idx, 8, 8)
    with pytest.raises(ConfigError, match="num_nvl_bytes=0"):
        buffer.get_dispatch_layout(idx, 8)
    for call in (
        lambda: buffer.low_latency_update_mask_buffer(0, True),
        lambda: buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32)),
        buffer.low_latency_clean_mask_buffer,
    ):
        with pytest.raises(ConfigError, match="enable_shrink"):
            call()
    buffer.destroy()


def test_calls_that_the_constructor_did_not_allow(pair: RankPool) -> None:
    pair.run(refused_without_mode)


def masked(rank: Rank) -> None:
    buffer = open_buffer(rank, SIZES, enable_shrink=True)
    with pytest.raises(ShapeError, match="rank_to_mask=2"):
        buffer.low_latency_update_mask_buffer(2, True)
    with pytest.raises(ShapeError, match="mask_status"):
        buffer.low_latency_query_mask_buffer(torch.zeros(3, dtype=torch.int32))
    buffer.destroy()


def test_masks_are_checked(pair: RankPool) -> None:
    pair.run(masked)


def refused_normal(rank: Rank) -> None:
    """Each raises before anything is sent: a good call follows on the same Buffer."""
    buffer = Buffer(rank.group, 1 << 20, explicitly_destroy=True)
    x = torch.ones((4, 512), dtype=torch.bfloat16, device=rank.device)
    first = torch.arange(0, 8, 2, device=rank.device)
    idx = torch.stack([first, (first + 4) % 8], 1)  # two ranks each, and every rank gets some
    weights = torch.ones((4, 2), device=rank.device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 8)
    layout = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }
    routes = {"topk_idx": idx, "topk_weights": weights}

    def refuse(kind: type[EpError], text: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            buffer.dispatch(*arguments, **options)

    refuse(ShapeError, "get_dispatch_layout", x, **routes)
    for no_rows in (None, (), [x], 5):
        refuse(ShapeError, "pass rows", no_rows, **layout, **routes)
    for no_choices in (None, idx[0]):
        with pytest.raises(ShapeError, match="topk_idx is"):
            buffer.get_dispatch_layout(no_choices, 8)
    refuse(ShapeError, "dtype", x.float(), **layout, **routes)
    refuse(ShapeError, "is_token_in_rank", x[:3], **layout, topk_idx=idx[:3])
    refuse(ShapeError, "topk_idx", x, **layout, topk_idx=idx[:3], topk_weights=weights)
    refuse(ShapeError, "expert_alignment", x, **layout, **routes, expert_alignment=0)
    refuse(ShapeError, "num_worst_tokens", x, **layout, **routes, num_worst_tokens=-1)
    refuse(SequenceError, "allocate", x, **layout, **routes, allocate_on_comm_stream=True)
    refuse(ShapeError, "previous_event", x, **layout, **routes, previous_event=7)
    rows, _, _, _, handle, _ = buffer.dispatch(x, **layout, **routes)
    assert isinstance(rows, torch.Tensor)
    assert handle is not None
    refuse(ShapeError, "handle", x, handle=handle, topk_idx=idx)
    refuse(ShapeError, "handle", x, handle=tuple(handle))
    for bad, text in ((rows.float(), "dtype"), (rows[1:], "shape")):
        with pytest.raises(ShapeError, match=text):
            buffer.combine(bad, handle)
    with pytest.raises(ShapeError, match="bias"):
        buffer.combine(rows, handle, bias=x[:3])
    with pytest.raises(ShapeError, match="handle"):
        buffer.combine(rows, handle[:3])
    out, _, _ = buffer.combine(rows, handle)
    rank.settle()
    assert torch.equal(out, x * 2)
    buffer.destroy()


def test_normal_calls_that_are_refused(pool: RankPool) -> None:
    pool.run(refused_normal)
