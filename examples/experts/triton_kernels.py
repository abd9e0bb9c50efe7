"""The kernels in Triton, for GPUs. Grids depend on sizes known at capture; a program that has no
rows, by counts it reads on the device, ends at once. Nothing is read on the host: capturable.

`examples.experts.parts.Kernels` says what each function does.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ep_runtime.reference import SCALE_GROUP
from examples.experts.parts import ROW_TILE, ExpertWeights, Groups

path = "Triton kernels, on the GPU"

COLUMN_TILE = 64  # output channels of one program; H is a multiple of 128
INNER_STEP = 64  # channels of I per step of the second GEMM
SORT_BLOCK = 256  # pairs of one program of the sort
SUM_BLOCK = 1024  # channels of one program of the sum


@triton.jit
def _locate(
    first, count, num_experts, per_expert,
    batched: tl.constexpr, experts_pad: tl.constexpr, row_tile: tl.constexpr,
):  # fmt: skip
    """(expert, first slot, rows) of this program's tile; rows <= 0: there is nothing to do."""
    tile = tl.program_id(0)
    if batched:
        tiles = tl.cdiv(per_expert, row_tile)
        expert = tile // tiles
        offset = (tile % tiles) * row_tile
        slot = expert * per_expert + offset
    else:
        slot = tile * row_tile
        e = tl.arange(0, experts_pad)
        ends = tl.load(first + 1 + e, mask=e < num_experts, other=2147483647)
        # Experts that end at or before the slot; all of them: the slot is behind the last row.
        expert = tl.sum((ends <= slot).to(tl.int32))
        offset = slot - tl.load(first + expert)
    rows = tl.load(count + expert, mask=expert < num_experts, other=0) - offset
    return expert, slot, rows


@triton.jit
def _gate_up_kernel(
    x, scales, gate, up, h, first, count, pairs, num_experts, per_expert,
    hidden: tl.constexpr, inner: tl.constexpr, topk: tl.constexpr, group: tl.constexpr,
    fp8: tl.constexpr, batched: tl.constexpr, gathers: tl.constexpr,
    experts_pad: tl.constexpr, row_tile: tl.constexpr, column_tile: tl.constexpr,
):  # fmt: skip
    expert, slot, rows = _locate(
        first, count, num_experts, per_expert, batched, experts_pad, row_tile
    )
    if rows <= 0:
        return
    m = tl.arange(0, row_tile)
    live = m < rows
    row = (slot + m).to(tl.int64)
    if gathers:
        row = (tl.load(pairs + slot + m, mask=live, other=0) // topk).to(tl.int64)
    n = tl.program_id(1) * column_tile + tl.arange(0, column_tile)
    inside = n < inner
    column = (expert.to(tl.int64) * inner + n) * hidden
    gated = tl.zeros([row_tile, column_tile], tl.float32)
    linear = tl.zeros([row_tile, column_tile], tl.float32)
    # A step is one group of channels: FP8 values are exact in BF16, and their scale is applied to
    # the group's FP32 sum. What a dead row or column holds stays in its own row or column.
    for g in range(hidden // group):
        k = g * group + tl.arange(0, group)
        a = tl.load(x + row[:, None] * hidden + k[None, :], mask=live[:, None])
        if fp8:
            a = a.to(tl.bfloat16)
        at = column[None, :] + k[:, None]
        p = tl.dot(a, tl.load(gate + at, mask=inside[None, :], other=0.0))
        q = tl.dot(a, tl.load(up + at, mask=inside[None, :], other=0.0))
        if fp8:
            scale = tl.load(scales + row * (hidden // group) + g, mask=live, other=0.0)
            p *= scale[:, None]
            q *= scale[:, None]
        gated += p
        linear += q
    result = gated * tl.sigmoid(gated) * linear
    to = (slot + m).to(tl.int64)[:, None] * inner + n[None, :]
    tl.store(h + to, result.to(tl.bfloat16), mask=live[:, None] & inside[None, :])


@triton.jit
def _down_kernel(
    h, down, out, first, count, pairs, weights, num_experts, per_expert,
    hidden: tl.constexpr, inner: tl.constexpr,
    batched: tl.constexpr, scatters: tl.constexpr, step: tl.constexpr,
    experts_pad: tl.constexpr, row_tile: tl.constexpr, column_tile: tl.constexpr,
):  # fmt: skip
    expert, slot, rows = _locate(
        first, count, num_experts, per_expert, batched, experts_pad, row_tile
    )
    if rows <= 0:
        return
    m = tl.arange(0, row_tile)
    live = m < rows
    row = (slot + m).to(tl.int64)
    n = tl.program_id(1) * column_tile + tl.arange(0, column_tile)
    column = (expert.to(tl.int64) * hidden + n) * inner
    total = tl.zeros([row_tile, column_tile], tl.float32)
    for start in range(0, inner, step):
        k = start + tl.arange(0, step)
        inside = k < inner
        a = tl.load(
            h + row[:, None] * inner + k[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(down + column[None, :] + k[:, None], mask=inside[:, None], other=0.0)
        total += tl.dot(a, b)
    if scatters:
        pair = tl.load(pairs + slot + m, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=live, other=0.0)
        tl.store(
            out + pair[:, None] * hidden + n[None, :], total * weight[:, None], mask=live[:, None]
        )
    else:
        tl.store(
            out + row[:, None] * hidden + n[None, :], total.to(tl.bfloat16), mask=live[:, None]
        )


@triton.jit
def _offsets_kernel(
    count, first, cursor, num_experts, experts_pad: tl.constexpr, row_tile: tl.constexpr
):
    e = tl.arange(0, experts_pad)
    here = e < num_experts
    slots = tl.cdiv(tl.load(count + e, mask=here, other=0), row_tile) * row_tile
    ends = tl.cumsum(slots, 0)
    tl.store(first + 1 + e, ends, mask=here)
    tl.store(first + e, ends - slots, mask=e == 0)
    tl.store(cursor + e, ends - slots, mask=here)


@triton.jit
def _sort_kernel(topk_idx, cursor, pairs, num_pairs, block: tl.constexpr):
    pair = tl.program_id(0) * block + tl.arange(0, block)
    expert = tl.load(topk_idx + pair, mask=pair < num_pairs, other=-1)
    here = expert >= 0
    slot = tl.atomic_add(cursor + expert, 1, mask=here)
    tl.store(pairs + slot, pair, mask=here)


@triton.jit
def _sum_kernel(
    terms, topk_idx, num_messages, y, num_ranks,
    hidden: tl.constexpr, topk: tl.constexpr, ranks_pad: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ranks_pad)
    if row >= tl.sum(tl.load(num_messages + r, mask=r < num_ranks, other=0)):
        return
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < hidden
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(topk):
        here = tl.load(topk_idx + row * topk + k) >= 0
        at = (row * topk + k) * hidden + channel
        total += tl.load(terms + at, mask=inside & here, other=0.0)
    tl.store(y + row * hidden + channel, total.to(tl.bfloat16), mask=inside)


def gate_up(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    groups: Groups,
    weights: ExpertWeights,
    h: torch.Tensor,
) -> None:
    """A program per tile of rows and COLUMN_TILE channels of I."""
    experts, inner, hidden = weights.gate.shape
    grid = (_row_tiles(groups, len(h)), triton.cdiv(inner, COLUMN_TILE))
    _gate_up_kernel[grid](
        x, scales, weights.gate, weights.up, h,
        groups.first, groups.count, groups.pairs, experts, groups.per_expert,
        hidden=hidden, inner=inner, topk=groups.topk, group=SCALE_GROUP,
        fp8=scales is not None, batched=groups.per_expert > 0, gathers=groups.pairs is not None,
        experts_pad=triton.next_power_of_2(experts), row_tile=ROW_TILE, column_tile=COLUMN_TILE,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def down(h: torch.Tensor, groups: Groups, weights: ExpertWeights, y: torch.Tensor) -> None:
    """A program per tile of rows and COLUMN_TILE channels of H."""
    _launch_down(h, groups, weights, None, y)


def down_weighted(
    h: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    terms: torch.Tensor,
) -> None:
    """As `down`; rows go to their pairs."""
    _launch_down(h, groups, weights, topk_weights, terms)


def sort(
    topk_idx: torch.Tensor,
    count: torch.Tensor,
    first: torch.Tensor,
    cursor: torch.Tensor,
    pairs: torch.Tensor,
) -> None:
    """One program for the offsets, then one atomic per choice."""
    experts, num_pairs = len(count), topk_idx.numel()
    _offsets_kernel[(1,)](
        count, first, cursor, experts,
        experts_pad=triton.next_power_of_2(experts), row_tile=ROW_TILE,
    )  # fmt: skip
    _sort_kernel[(triton.cdiv(num_pairs, SORT_BLOCK),)](
        topk_idx, cursor, pairs, num_pairs, block=SORT_BLOCK
    )


def sum_terms(
    terms: torch.Tensor, topk_idx: torch.Tensor, num_messages: torch.Tensor, y: torch.Tensor
) -> None:
    """A program per message and SUM_BLOCK channels."""
    rows, hidden = y.shape
    ranks = len(num_messages)
    _sum_kernel[(rows, triton.cdiv(hidden, SUM_BLOCK))](
        terms, topk_idx, num_messages, y, ranks,
        hidden=hidden, topk=topk_idx.shape[1],
        ranks_pad=triton.next_power_of_2(ranks), block=SUM_BLOCK,
    )  # fmt: skip


def _launch_down(
    h: torch.Tensor,
    groups: Groups,
    weights: ExpertWeights,
    topk_weights: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    experts, hidden, inner = weights.down.shape
    _down_kernel[(_row_tiles(groups, len(h)), hidden // COLUMN_TILE)](
        h, weights.down, out,
        groups.first, groups.count, groups.pairs, topk_weights, experts, groups.per_expert,
        hidden=hidden, inner=inner,
        batched=groups.per_expert > 0, scatters=topk_weights is not None, step=INNER_STEP,
        experts_pad=triton.next_power_of_2(experts), row_tile=ROW_TILE, column_tile=COLUMN_TILE,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _row_tiles(groups: Groups, slots: int) -> int:
    """Tiles that hold every slot; batched ones begin anew with each expert."""
    if groups.per_expert:
        return len(groups.count) * -(-groups.per_expert // ROW_TILE)
    return -(-slots // ROW_TILE)
