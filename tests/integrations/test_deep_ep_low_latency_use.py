"""Low-latency calls as serving engines make them: memory lent, early buffers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import (
    Format,
    Sent,
    check_received,
    combine,
    dispatch,
    experts,
    open_buffer,
)
from traffic import Sizes, draw

from ep_runtime.buffer import Buffer as EpBuffer
from ep_runtime.errors import ConfigError

SIZES = Sizes(num_experts=8, topk=3, hidden=512, max_tokens=8)
BF16 = Format()


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not is_dataclass(value):
        return []
    return [t for field in fields(value) for t in tensors_in(getattr(value, field.name))]


def addresses(tensors: Any) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def lent(rank: Rank, seed: int, fmt: Format) -> None:
    """An asynchronous call keeps all memory that its kernels use beside the native buffer's own."""
    buffer = open_buffer(rank, SIZES)
    made: list[torch.Tensor] = []
    original = EpBuffer.new_receive

    def recording(self: EpBuffer, **options: Any) -> Any:
        into = original(self, **options)
        made.extend(tensors_in(into.received))
        return into

    own = draw(seed, SIZES, rank.num_ranks, full=True)[rank.rank].on(rank.device)
    sizes = SIZES.max_tokens, SIZES.num_experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpBuffer, "new_receive", recording)
        received, _, handle, event, _ = buffer.low_latency_dispatch(
            own.x, own.topk_idx, *sizes, **fmt.arguments, async_finish=True
        )
    assert len(made) >= 6  # rows, counts of rows and of messages, sources, ranges, routing
    routing = handle.routing.routing.data_ptr()
    assert addresses([own.x, own.topk_idx, *made]) <= addresses(event.extra_tensors)
    assert routing in addresses(event.extra_tensors)
    event.current_stream_wait()
    rows = received[0] if fmt.fp8 else received
    y = torch.zeros(rows.shape, dtype=torch.bfloat16, device=rank.device)
    out, event, _ = buffer.low_latency_combine(
        y, own.topk_idx, own.weights, handle, async_finish=True
    )
    used = [y, own.weights, out, handle[0], handle[1]]
    assert addresses(used) | {routing} <= addresses(event.extra_tensors)
    event.current_stream_wait()
    buffer.destroy()


@pytest.mark.parametrize("fmt", [BF16, Format(True)], ids=["bf16", "fp8"])
def test_asynchronous_calls_keep_what_they_use(pool: RankPool, seed: int, fmt: Format) -> None:
    pool.run(lent, seed, fmt)


def early_buffer(rank: Rank, seed: int) -> None:
    """The rows of the next combine are asked for while the dispatch is under way."""
    buffer = open_buffer(rank, SIZES)
    everyone = draw(seed, SIZES, rank.num_ranks)
    sent = Sent(everyone, everyone[rank.rank].on(rank.device), SIZES, BF16)
    sent.received, sent.count, sent.handle, _, hook = buffer.low_latency_dispatch(
        sent.own.x,
        sent.own.topk_idx,
        SIZES.max_tokens,
        SIZES.num_experts,
        use_fp8=False,
        return_recv_hook=True,
    )
    with torch.inference_mode():  # whoever asks first, all may write
        rows = buffer.get_next_low_latency_combine_buffer(sent.handle)
    hook()
    assert buffer.get_next_low_latency_combine_buffer(sent.handle) is rows
    rows[:] = experts(rank, sent)
    combine(rank, buffer, sent, y=rows, zero_copy=True)
    buffer.destroy()


def test_the_combine_buffer_is_there_before_the_hook(pool: RankPool, seed: int) -> None:
    pool.run(early_buffer, seed)


def unused_exponents(rank: Rank, seed: int) -> None:
    """use_ue8m0 says how scales are kept: without use_fp8 there are none."""
    buffer = open_buffer(rank, SIZES)
    plain = Format(False, True, True)
    sent = dispatch(rank, buffer, SIZES, seed, plain, "plain")
    check_received(rank, sent)
    combine(rank, buffer, sent)
    own = sent.own
    for fp8 in (True, False):  # DeepEP asserts before both kernels
        with pytest.raises(ConfigError, match="round_scale=False"):
            buffer.low_latency_dispatch(
                own.x, own.topk_idx, SIZES.max_tokens, 8, use_fp8=fp8, use_ue8m0=True
            )
    buffer.destroy()


def test_exponents_without_scales_are_nothing(pair: RankPool, seed: int) -> None:
    pair.run(unused_exponents, seed)
