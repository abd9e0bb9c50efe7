"""Low-latency calls as a rank makes them, checked by what DeepEP promises of each result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from deep_ep_ranks import Rank
from traffic import (
    Sizes,
    Tokens,
    calc_diff,
    dequantise,
    draw,
    gain_of,
    quantise,
    unpack_ue8m0,
    weighted,
    without,
)

from ep_runtime.integrations.deep_ep import Buffer

MODES = ("plain", "async", "hook")
# 1 - 2<x,y> / (<x,x> + <y,y>) that a round trip may be off by
LIMITS = {True: 9e-4, False: 1e-5}


@dataclass(frozen=True)
class Format:
    """use_fp8, round_scale, use_ue8m0"""

    fp8: bool = False
    rounded: bool = False
    ue8m0: bool = False

    @property
    def arguments(self) -> dict[str, bool]:
        return {"use_fp8": self.fp8, "round_scale": self.rounded, "use_ue8m0": self.ue8m0}


FORMATS = (Format(), Format(True), Format(True, True), Format(True, True, True))


def open_buffer(rank: Rank, sizes: Sizes, **options: Any) -> Buffer:
    """As DeepEP's users build one for low latency."""
    num_bytes = Buffer.get_low_latency_rdma_size_hint(
        sizes.max_tokens, sizes.hidden, rank.num_ranks, sizes.num_experts
    )
    return Buffer(
        rank.group,
        0,
        num_bytes,
        low_latency_mode=True,
        num_qps_per_rank=sizes.num_experts // rank.num_ranks,
        explicitly_destroy=True,
        **options,
    )


def finish(mode: str, event: Any, hook: Any) -> None:
    """Do what the mode asks of the caller before it uses results."""
    assert (hook is not None) == (mode == "hook")
    assert (event.event is not None) == (mode == "async")
    if mode == "hook":
        hook()
    if mode == "async":
        event.current_stream_wait()


def mode_arguments(mode: str) -> dict[str, bool]:
    return {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}


@dataclass
class Sent:
    """One dispatch of all ranks, and what came of it here."""

    everyone: list[Tokens]
    own: Tokens
    sizes: Sizes
    format: Format
    received: Any = None
    count: Any = None
    handle: Any = None


def dispatch(
    rank: Rank,
    buffer: Buffer,
    sizes: Sizes,
    seed: int,
    fmt: Format,
    mode: str,
    masked: Collection[int] = (),
    **options: Any,
) -> Sent:
    """masked: ranks that send nothing and whose experts nobody reaches."""
    everyone = draw(seed, sizes, rank.num_ranks)
    own = everyone[rank.rank].on(rank.device)
    sent = Sent(without(everyone, sizes, masked), own, sizes, fmt)
    sent.received, sent.count, sent.handle, event, hook = buffer.low_latency_dispatch(
        sent.own.x,
        sent.own.topk_idx,
        sizes.max_tokens,
        sizes.num_experts,
        **fmt.arguments,
        **mode_arguments(mode),
        **options,
    )
    finish(mode, event, hook)
    return sent


def rows_of(sent: Sent) -> torch.Tensor:
    """FP64 values of what was received [L, R*M, H]."""
    if sent.format.fp8:
        return dequantise(*sent.received)
    return sent.received.double()


def experts(rank: Rank, sent: Sent) -> torch.Tensor:
    """What the experts here make of their rows, bf16; NaN where there is none."""
    values = rows_of(sent)
    local = values.shape[0]
    y = torch.full(values.shape, float("nan"), dtype=torch.bfloat16, device=values.device)
    for expert in range(local):
        count = int(sent.count[expert])
        gain = gain_of(rank.rank * local + expert)
        y[expert, :count] = (values[expert, :count] * gain).bfloat16()
    return y


def combine(
    rank: Rank,
    buffer: Buffer,
    sent: Sent,
    mode: str = "plain",
    *,
    weights: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    most: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Combine and compare with FP64. most: of calc_diff, other than the dispatch's rounding has."""
    weights = sent.own.weights if weights is None else weights
    y = experts(rank, sent) if y is None else y
    out, event, hook = buffer.low_latency_combine(
        y, sent.own.topk_idx, weights, sent.handle, **mode_arguments(mode), **options
    )
    finish(mode, event, hook)
    rank.settle()
    assert out.dtype == torch.bfloat16
    assert out.shape == sent.own.x.shape
    wanted = weighted(sent.everyone[rank.rank], weights.cpu())
    assert not out.isnan().any()
    diff = calc_diff(out, wanted)
    most = LIMITS[sent.format.fp8] if most is None else most
    assert diff < most, f"{sent.format}: off by {diff}"
    return out


def check_received(rank: Rank, sent: Sent) -> None:
    """Counts, ranges, source tokens and rows are those that were sent; strides are DeepEP's."""
    rank.settle()
    sizes, fmt = sent.sizes, sent.format
    local, rows = sizes.num_experts // rank.num_ranks, rank.num_ranks * sizes.max_tokens
    check_form(sent, local, rows)
    src_info, layout_range, max_tokens, hidden, num_experts = sent.handle
    assert (max_tokens, hidden, num_experts) == (sizes.max_tokens, sizes.hidden, sizes.num_experts)
    assert src_info.shape == (local, rows)
    assert src_info.dtype == torch.int32
    assert layout_range.shape == (local, rank.num_ranks)
    assert layout_range.dtype == torch.int64
    for expert in range(local):
        seen = 0
        for source, tokens in enumerate(sent.everyone):
            mine = tokens.topk_idx == rank.rank * local + expert
            wanted = mine.any(1).nonzero().flatten()
            word = int(layout_range[expert, source])
            begin, count = word >> 32, word & 0xFFFFFFFF
            assert count == len(wanted)
            span = slice(begin, begin + count)
            came = src_info[expert, span].long().cpu()
            assert sorted(came.tolist()) == wanted.tolist()
            check_rows(sent, expert, span, tokens.x[came], fmt)
            seen += count
        assert int(sent.count[expert]) == seen


def check_form(sent: Sent, local: int, rows: int) -> None:
    sizes, fmt = sent.sizes, sent.format
    assert sent.count.shape == (local,)
    assert sent.count.dtype == torch.int32
    if not fmt.fp8:
        assert isinstance(sent.received, torch.Tensor)
        assert sent.received.dtype == torch.bfloat16
        assert sent.received.shape == (local, rows, sizes.hidden)
        assert sent.received.is_contiguous()
        return
    x, scales = sent.received
    assert x.dtype == torch.float8_e4m3fn
    assert x.shape == (local, rows, sizes.hidden)
    assert x.is_contiguous()
    groups = sizes.hidden // (512 if fmt.ue8m0 else 128)
    assert scales.dtype == (torch.int32 if fmt.ue8m0 else torch.float32)
    assert scales.shape == (local, rows, groups)
    assert scales.stride() == (rows * groups, 1, rows)


def check_rows(sent: Sent, expert: int, span: slice, x: torch.Tensor, fmt: Format) -> None:
    """The rows of one expert from one source are `x`, or x quantised."""
    if not fmt.fp8:
        assert torch.equal(sent.received[expert, span].cpu(), x)
        return
    values, scales = (part[expert, span].cpu() for part in sent.received)
    wanted, wanted_scales = quantise(x, fmt.rounded)
    got_scales = unpack_ue8m0(scales) if fmt.ue8m0 else scales.double()
    assert torch.allclose(got_scales, wanted_scales, rtol=2e-7, atol=0)
    if not x.numel():
        return
    if fmt.rounded:
        assert torch.equal(got_scales, wanted_scales)
        assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    else:
        # Where x lies in the middle of two e4m3 numbers, the scale's own rounding decides.
        off = (dequantise(values, scales) - x.double()).abs()
        best = (dequantise(wanted, wanted_scales) - x.double()).abs()
        slack = 1e-6 * x.double().abs().amax(1, keepdim=True)
        assert bool((off <= best + slack).all())
