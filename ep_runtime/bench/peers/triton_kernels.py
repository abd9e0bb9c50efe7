"""What the user of a bare collective has to add: quantise and pack, permute, weighted sum.

Written to be fast, so that a peer is not slowed by its additions: one program per row, each row
read once, positions from one atomic per (row, local expert).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ep_runtime.bench.peers.wire import RowViews, Wire
from ep_runtime.bench.routing import Inputs
from ep_runtime.reference import SCALE_GROUP

MOST_EXPERTS = 1024  # of a rank, a power of two
SUM_BLOCK = 1024  # channels of one program of the weighted sum


@triton.jit
def _pack_kernel(
    x, topk_idx, topk_weights, slots, counts,
    values, scales, out_idx, out_weights, num_counts,
    row_stride: tl.constexpr, entry_stride: tl.constexpr,
    hidden: tl.constexpr, topk: tl.constexpr, num_slots: tl.constexpr,
    groups: tl.constexpr, groups_pad: tl.constexpr, topk_pad: tl.constexpr,
    counts_pad: tl.constexpr, fp8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if token == 0:  # the permute behind the exchange counts from zero
        c = tl.arange(0, counts_pad)
        tl.store(counts + c, tl.zeros([counts_pad], tl.int32), mask=c < num_counts)
    g = tl.arange(0, groups_pad)
    channel = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (g < groups)[:, None]
    row = tl.load(x + token * hidden + channel, mask=inside, other=0.0)
    k = tl.arange(0, topk_pad)
    experts = tl.load(topk_idx + token * topk + k, mask=k < topk, other=-1).to(tl.int32)
    weights = tl.load(topk_weights + token * topk + k, mask=k < topk, other=0.0)
    if fp8:
        row = row.to(tl.float32)
        amax = tl.maximum(tl.max(tl.abs(row), axis=1), 1e-4)
        row = (row * (448.0 / amax)[:, None]).to(tl.float8e4nv)
    for j in tl.static_range(num_slots):
        slot = tl.load(slots + token * num_slots + j).to(tl.int64)
        if slot >= 0:
            tl.store(values + slot * row_stride + channel, row, mask=inside)
            if fp8:
                tl.store(scales + slot * entry_stride + g, amax / 448.0, mask=g < groups)
            tl.store(out_idx + slot * entry_stride + k, experts, mask=k < topk)
            tl.store(out_weights + slot * entry_stride + k, weights, mask=k < topk)


@triton.jit
def _permute_kernel(
    values, scales, topk_idx, counts, out, out_scales, place,
    first_expert, num_local, capacity,
    row_stride: tl.constexpr, entry_stride: tl.constexpr,
    hidden: tl.constexpr, topk: tl.constexpr, groups: tl.constexpr, groups_pad: tl.constexpr,
    fp8: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, groups_pad)
    channel = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (g < groups)[:, None]
    row = tl.load(values + n * row_stride + channel, mask=inside)
    if fp8:
        scale = tl.load(scales + n * entry_stride + g, mask=g < groups)
    for k in tl.static_range(topk):
        local = tl.load(topk_idx + n * entry_stride + k) - first_expert
        if (local >= 0) & (local < num_local):
            position = tl.atomic_add(counts + local, 1)
            to = local.to(tl.int64) * capacity + position
            tl.store(out + to * hidden + channel, row, mask=inside)
            if fp8:
                tl.store(out_scales + to * groups + g, scale, mask=g < groups)
            tl.store(place + n * topk + k, to.to(tl.int32))
        else:
            tl.store(place + n * topk + k, -1)


@triton.jit
def _weighted_sum_kernel(
    y, place, weights, out,
    weight_stride: tl.constexpr, hidden: tl.constexpr, terms: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(terms):
        row = tl.load(place + n * terms + k).to(tl.int64)
        weight = tl.load(weights + n * weight_stride + k)
        term = tl.load(
            y + tl.maximum(row, 0) * hidden + channel,
            mask=(channel < hidden) & (row >= 0),
            other=0.0,
        )
        total += weight * term.to(tl.float32)
    tl.store(out + n * hidden + channel, total.to(tl.bfloat16), mask=channel < hidden)


def pack(
    wire: Wire, rows: torch.Tensor, inputs: Inputs, slots: torch.Tensor, counts: torch.Tensor
) -> None:
    """Quantise x and write token t into every row slots[t, j] >= 0; zero `counts` [L] int32."""
    if not len(inputs.x):  # no program would run to zero the counts
        counts.zero_()
        return
    views = wire.views(rows)
    groups = wire.hidden // SCALE_GROUP
    _pack_kernel[(inputs.x.shape[0],)](
        inputs.x, inputs.topk_idx, inputs.topk_weights, slots, counts,
        views.values, views.scales, views.topk_idx, views.topk_weights, counts.numel(),
        row_stride=views.values.stride(0), entry_stride=views.topk_idx.stride(0),
        hidden=wire.hidden, topk=wire.topk, num_slots=slots.shape[1],
        groups=groups, groups_pad=triton.next_power_of_2(groups),
        topk_pad=triton.next_power_of_2(wire.topk), counts_pad=MOST_EXPERTS, fp8=wire.fp8,
        num_warps=8,
    )  # fmt: skip


def permute(
    wire: Wire,
    received: RowViews,
    first_expert: int,
    counts: torch.Tensor,
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    place: torch.Tensor,
) -> None:
    """Copy rows [N] to out [L, capacity, H] by local expert; place [N, K] int32 says where, or -1.

    `counts` [L] must be zero before and holds the rows per expert after.
    """
    groups = wire.hidden // SCALE_GROUP
    _permute_kernel[(place.shape[0],)](
        received.values, received.scales, received.topk_idx, counts, out, out_scales, place,
        first_expert, out.shape[0], out.shape[1],
        row_stride=received.values.stride(0), entry_stride=received.topk_idx.stride(0),
        hidden=wire.hidden, topk=wire.topk, groups=groups,
        groups_pad=triton.next_power_of_2(groups), fp8=wire.fp8, num_warps=8,
    )  # fmt: skip


def weighted_sum(
    y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
) -> None:
    """out [N, H] = sum over k of weights[n, k] * y[place[n, k]], rows -1 left out; FP32 inside."""
    num_rows, terms = place.shape
    hidden = out.shape[1]
    _weighted_sum_kernel[(num_rows, triton.cdiv(hidden, SUM_BLOCK))](
        y, place, weights, out,
        weight_stride=weights.stride(0), hidden=hidden, terms=terms, block=SUM_BLOCK, num_warps=4,
    )  # fmt: skip
