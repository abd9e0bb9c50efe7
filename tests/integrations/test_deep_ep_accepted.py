"""What DeepEP takes or tells and its users' programs rely on, beside the results of its calls."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import Format, combine, dispatch, open_buffer
from traffic import Sizes

from ep_runtime.errors import ConfigError, EpError, SequenceError, ShapeError
from ep_runtime.integrations.deep_ep import (
    Buffer,
    Config,
    EventOverlap,
)

SIZES = Sizes(num_experts=8, topk=2, hidden=512, max_tokens=8)


# ---- life ---------------------------------------------------------------------------------------


def masks_after_destroy(rank: Rank) -> None:
    buffer = open_buffer(rank, SIZES, enable_shrink=True)
    buffer.destroy()
    status = torch.full((rank.num_ranks,), 9, dtype=torch.int32)
    for call in (
        lambda: buffer.low_latency_update_mask_buffer(0, True),
        lambda: buffer.low_latency_query_mask_buffer(status),
        buffer.low_latency_clean_mask_buffer,
    ):
        with pytest.raises(SequenceError, match="destroyed"):
            call()
    assert status.tolist() == [9] * rank.num_ranks


def test_mask_calls_of_a_destroyed_buffer_are_refused(pair: RankPool) -> None:
    pair.run(masks_after_destroy)


def test_a_construction_that_fails_says_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for group_, options in ((None, {}), (None, {"num_nvl_bytes": 1}), (object(), {})):
        with pytest.raises((EpError, AttributeError)):
            Buffer(group_, **options)
    gc.collect()
    assert not said


# ---- numbers ------------------------------------------------------------------------------------


def test_a_subclass_sets_the_number_of_sms_of_all() -> None:
    class Own(Buffer):
        pass

    try:
        Own.set_num_sms(48)
        assert Buffer.num_sms == Own.num_sms == 48
        assert Buffer.get_dispatch_config(2).num_sms == 48
        Buffer.set_num_sms(36)
        assert Own.num_sms == Own.get_combine_config(2).num_sms == 36
    finally:
        Buffer.set_num_sms(20)


def test_integers_of_numpy_are_integers() -> None:
    config = Config(np.int64(24), np.int32(8))
    assert config == Config(24, 8)
    assert type(config.num_sms) is int
    row = np.int64(1024)
    assert config.get_nvl_buffer_size_hint(row, np.int32(2)) == config.get_nvl_buffer_size_hint(
        1024, 2
    )
    assert Buffer.get_dispatch_config(np.int64(2)) == Buffer.get_dispatch_config(2)
    sizes = [np.int64(size) for size in (128, 7168, 8, 256)]
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert Buffer.get_low_latency_rdma_size_hint(*sizes) == hint
    try:
        Buffer.set_num_sms(np.int16(32))
        assert type(Buffer.num_sms) is int
    finally:
        Buffer.set_num_sms(20)
    for bad in (True, np.bool_(True), 2.0, np.float64(2), "2", torch.tensor(2)):
        with pytest.raises(ConfigError):
            Buffer.get_dispatch_config(bad)
        with pytest.raises(ConfigError):
            Config(20, bad)


def numpy_calls(rank: Rank, seed: int) -> None:
    buffer = Buffer(
        rank.group,
        np.int64(1 << 20),
        np.int64(0),
        True,
        np.int64(4),
        explicitly_destroy=True,
        enable_shrink=True,
    )
    assert type(buffer.num_nvl_bytes) is int
    buffer.low_latency_update_mask_buffer(np.int64(0), False)
    with pytest.raises(ShapeError, match="rank_to_mask=True"):
        buffer.low_latency_update_mask_buffer(True, False)
    sent = dispatch(rank, buffer, SIZES, seed, Format(), "plain")
    sizes = Sizes(np.int64(8), 2, 512, np.int64(8))  # the memory of the call before
    combine(rank, buffer, dispatch(rank, buffer, sizes, seed, Format(), "plain"))
    combine(rank, buffer, sent)
    buffer.clean_low_latency_buffer(np.int64(8), np.int64(512), np.int64(8))
    x = torch.ones((4, 512), dtype=torch.bfloat16)
    idx = torch.arange(4).unsqueeze(1)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, np.int64(8))
    rows, _, _, counts, _, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
        topk_idx=idx,
        topk_weights=torch.ones((4, 1)),
        expert_alignment=np.int64(4),
        num_worst_tokens=np.int64(0),
    )
    assert counts == [4 if rank.rank == 0 else 0] * 4  # two of each, rounded up
    assert rows.shape == (8 if rank.rank == 0 else 0, 512)
    buffer.destroy()


def test_calls_take_integers_of_numpy(pair: RankPool, seed: int) -> None:
    pair.run(numpy_calls, seed)


def odd_sms(rank: Rank) -> None:
    """A Config may have any number of SMs; a call takes those that DeepEP's kernels take."""
    buffer = Buffer(rank.group, 1 << 20, explicitly_destroy=True, num_qps_per_rank=0)
    x = torch.ones((4, 512), dtype=torch.bfloat16)
    idx = torch.arange(4).unsqueeze(1)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 8)
    layout = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }
    rows, _, _, _, handle, _ = buffer.dispatch(x, **layout, config=Config(2))
    for number in (0, 21):
        config = Config(number)
        assert config.num_sms == number
        with pytest.raises(ConfigError, match=f"num_sms={number}"):
            buffer.dispatch(x, **layout, config=config)
        with pytest.raises(ConfigError, match=f"num_sms={number}"):
            buffer.combine(rows, handle, config=config)
    assert torch.equal(buffer.combine(rows, handle)[0], x)
    buffer.destroy()


def test_numbers_of_sms_are_checked_where_they_are_used(pair: RankPool) -> None:
    pair.run(odd_sms)


# ---- arguments of normal calls ------------------------------------------------------------------


class Derived(EventOverlap):
    """A program's own."""


class Lookalike:
    """Has an event as DeepEP looks for it, and nothing else."""

    def __init__(self, event: object) -> None:
        self.event = event


def loose_arguments(rank: Rank) -> None:
    buffer = Buffer(rank.group, 1 << 20, explicitly_destroy=True)
    x = torch.ones((4, 512), dtype=torch.bfloat16, device=rank.device)
    idx = torch.arange(4, device=rank.device).unsqueeze(1)
    event = Buffer.capture().event
    for previous in (Derived(event), Derived(), Lookalike(event), Lookalike(None)):
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            idx, 8, previous_event=previous
        )
        rows, _, _, _, handle, done = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            previous_event=previous,
            async_finish=True,
        )
        done.current_stream_wait()
    for wrong in (7, event, Lookalike(7)):
        with pytest.raises(ShapeError, match="previous_event"):
            buffer.get_dispatch_layout(idx, 8, previous_event=wrong)
    for bias, factor in (((x, None), 2), ((None, x), 2), ((None, None), 1), ((x, x), 3)):
        for asynchronous in (False, True):
            out, _, done = buffer.combine(rows, handle, bias=bias, async_finish=asynchronous)
            rank.settle()
            assert torch.equal(out, x * factor)
            if asynchronous:
                assert all(isinstance(kept, torch.Tensor) for kept in done.extra_tensors)
    buffer.destroy()


def test_events_and_biases_as_deep_ep_looks_at_them(pool: RankPool) -> None:
    pool.run(loose_arguments)


# ---- names --------------------------------------------------------------------------------------


def names(rank: Rank) -> None:
    buffer = Buffer(rank.group, low_latency_mode=True, explicitly_destroy=True)
    most = 8192  # tokens of a low-latency call
    assert buffer.nvshmem_qp_depth >= (most + 1) * 2  # as DeepEP's users check it
    buffer.destroy()


def test_attributes_that_programs_read(pair: RankPool) -> None:
    pair.run(names)


class Point:
    """Counts waits."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream_wait(self) -> None:
        self.waits += 1


def test_events_are_released_and_call_hooks() -> None:
    point = Point()
    overlap = EventOverlap(point, (torch.zeros(1),))
    with overlap() as same:
        assert same is overlap
        assert point.waits == 0
    assert point.waits == 1
    assert overlap.event is point
    seen: list[int] = []
    overlap.register_hook_after_wait(lambda: seen.append(point.waits))
    with pytest.raises(SequenceError, match="register_hook_after_wait"):
        overlap.register_hook_after_wait(lambda: None)
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert (seen, point.waits) == ([2], 3)  # once, behind the wait
    with overlap(release_handle=True):
        assert overlap.event is point
    assert point.waits == 4
    assert overlap.event is None
    with overlap:  # nothing left to wait for
        pass
    again = EventOverlap(point)
    with again(release_handle=True):
        pass
    again.event = point
    with again:  # release was asked for one block alone
        pass
    assert again.event is point
    again.current_stream_wait(release_handle=True)
    assert again.event is None
    with pytest.raises(SequenceError, match="async_finish"):
        again.current_stream_wait()
