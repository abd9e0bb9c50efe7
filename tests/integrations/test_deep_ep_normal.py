"""Every argument of the normal calls, on CPU processes and on GPUs."""

from __future__ import annotations

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from normal_cases import (
    Flow,
    check_received,
    check_rows,
    combine,
    dispatch,
    open_buffer,
    tokens,
    wanted_here,
)
from traffic import Sizes, calc_diff, draw

from ep_runtime.integrations.deep_ep import Buffer, Config, EventHandle, EventOverlap

SIZES = Sizes(num_experts=8, topk=3, hidden=512, max_tokens=60)
FLOWS = pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])


def round_trips(rank: Rank, seed: int, asynchronous: bool, sizes: Sizes) -> None:
    buffer, flow = open_buffer(rank, sizes.hidden), Flow(asynchronous)
    for turn in range(5):
        everyone, align = tokens(seed + turn, rank, sizes), 1 + 7 * turn
        sent = dispatch(rank, buffer, everyone, sizes, flow, expert_alignment=align)
        check_received(rank, sent, alignment=align)
        combine(rank, buffer, sent, flow, num_biases=turn % 3, with_weights=turn % 2 == 0)
    buffer.destroy()


@FLOWS
def test_round_trip(pool: RankPool, seed: int, asynchronous: bool) -> None:
    pool.run(round_trips, seed, asynchronous, SIZES)


def test_sizes_that_no_list_holds(pair: RankPool, seed: int) -> None:
    """A hidden size, a top-k and a number of experts that DeepEP was not compiled for."""
    pair.run(round_trips, seed, False, Sizes(34, 17, 648, 9))


def fp8(rank: Rank, seed: int, asynchronous: bool) -> None:
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(asynchronous)
    for turn in range(3):
        everyone = tokens(seed + turn, rank, SIZES)
        sent = dispatch(rank, buffer, everyone, SIZES, flow, fp8=True)
        check_received(rank, sent)
    buffer.destroy()


@FLOWS
def test_quantised_rows_keep_their_scales_of_any_strides(
    pool: RankPool, seed: int, asynchronous: bool
) -> None:
    pool.run(fp8, seed, asynchronous)


def worst_case(rank: Rank, seed: int, asynchronous: bool) -> None:
    """As many rows as asked for; the unused ones name no expert."""
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(asynchronous)
    worst = rank.num_ranks * SIZES.max_tokens
    dispatch(rank, buffer, draw(seed, SIZES, rank.num_ranks, full=True), SIZES, flow)
    for turn in range(3):
        everyone = tokens(seed + turn, rank, SIZES)
        sent = dispatch(rank, buffer, everyone, SIZES, flow, num_worst_tokens=worst)
        check_received(rank, sent, worst=worst)
        combine(rank, buffer, sent, flow)
    buffer.destroy()


@FLOWS
def test_worst_case_mode(pool: RankPool, seed: int, asynchronous: bool) -> None:
    pool.run(worst_case, seed, asynchronous)


def cached(rank: Rank, seed: int, asynchronous: bool) -> None:
    """A handle sends other rows the same way, also after other traffic, and combines again."""
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(asynchronous)
    first = dispatch(rank, buffer, tokens(seed, rank, SIZES), SIZES, flow)
    combine(rank, buffer, first, flow)
    other = dispatch(rank, buffer, tokens(seed + 1, rank, SIZES), SIZES, flow)
    for turn in range(2):
        rng = torch.Generator().manual_seed(seed + 5 + turn)
        everyone = [
            type(t)(torch.randn(t.x.shape, generator=rng).bfloat16(), t.topk_idx, t.weights)
            for t in first.everyone
        ]
        x = everyone[rank.rank].x.to(rank.device)
        result = buffer.dispatch(x, handle=first.handle, **flow.arguments())
        assert result[1:5] == (None, None, None, None)
        flow.done(result[5])
        flow.settle()
        rank.settle()
        again = type(first)(**{**vars(first), "everyone": everyone, "received": result[0]})
        again.weights = None
        check_rows(again, wanted_here(rank, again), result[0])
        combine(rank, buffer, again, flow)
    check_received(rank, other)
    combine(rank, buffer, other, flow)
    buffer.destroy()


@FLOWS
def test_cached_handles(pool: RankPool, seed: int, asynchronous: bool) -> None:
    pool.run(cached, seed, asynchronous)


def rows_alone(rank: Rank, seed: int) -> None:
    """Without topk_idx the layout alone decides."""
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(False)
    sent = dispatch(rank, buffer, tokens(seed, rank, SIZES), SIZES, flow, routes=False)
    assert sent.topk_idx is None
    assert sent.weights is None
    check_received(rank, sent)
    combine(rank, buffer, sent, flow)
    buffer.destroy()


def test_rows_alone(pool: RankPool, seed: int) -> None:
    pool.run(rows_alone, seed)


def configured(rank: Rank, seed: int) -> None:
    """A Config, or set_num_sms, limits the SMs and changes no result."""
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(False)
    everyone = tokens(seed, rank, SIZES)
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(8)
        assert Buffer.get_dispatch_config(rank.num_ranks).num_sms == 8
        assert Buffer.get_combine_config(rank.num_ranks).num_sms == 8
        sent = dispatch(rank, buffer, everyone, SIZES, flow, config=Config(4, 6, 128))
        check_received(rank, sent)
        combine(rank, buffer, sent, flow)
    finally:
        Buffer.set_num_sms(before)
    buffer.destroy()


def test_configurations(pool: RankPool, seed: int) -> None:
    pool.run(configured, seed)


def two_buffers(rank: Rank, seed: int) -> None:
    flow = Flow(False)
    one, two = (open_buffer(rank, SIZES.hidden) for _ in range(2))
    a = dispatch(rank, one, tokens(seed, rank, SIZES), SIZES, flow)
    b = dispatch(rank, two, tokens(seed + 1, rank, SIZES), SIZES, flow)
    check_received(rank, a)
    check_received(rank, b)
    combine(rank, two, b, flow)
    combine(rank, one, a, flow)
    two.destroy()
    one.destroy()
    check_received(rank, a)  # received tensors outlive their Buffer


def test_two_buffers_in_one_process(pool: RankPool, seed: int) -> None:
    pool.run(two_buffers, seed)


class Dispatch(torch.autograd.Function):
    """As training frameworks wrap DeepEP: the backward pass of a dispatch is a combine."""

    @staticmethod
    def forward(ctx, x, idx, weights, buffer, num_experts):  # type: ignore[no-untyped-def]
        event = EventOverlap(EventHandle())
        per_rank, per_rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(
            idx, num_experts, previous_event=event, async_finish=True, allocate_on_comm_stream=True
        )
        rows, recv_idx, recv_weights, _, handle, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_idx)
        return rows, recv_idx, recv_weights, handle

    @staticmethod
    def backward(ctx, grad_rows, _idx, grad_weights, _handle):  # type: ignore[no-untyped-def]
        grad, grad_w, _ = ctx.buffer.combine(
            grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights.float()
        )
        return grad, None, grad_w, None, None


class Combine(torch.autograd.Function):
    """And the backward pass of a combine is a cached dispatch."""

    @staticmethod
    def forward(ctx, y, buffer, handle):  # type: ignore[no-untyped-def]
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y, handle)[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, *_ = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)
        return rows, None, None


def gradients(rank: Rank, seed: int) -> None:
    """Loss over a MoE layer (each expert scales by its gain): gradients of x and of the weights."""
    buffer = open_buffer(rank, SIZES.hidden)
    own = tokens(seed, rank, SIZES)[rank.rank].on(rank.device)
    x, weights = own.x.clone().requires_grad_(), own.weights.clone().requires_grad_()
    local = SIZES.num_experts // rank.num_ranks
    gains = torch.tensor([1.0, 0.5, 2.0, 0.25] * 2, device=rank.device)
    rows, idx, recv_weights, handle = Dispatch.apply(
        x, own.topk_idx, weights, buffer, SIZES.num_experts
    )
    here = torch.where(idx >= 0, gains[rank.rank * local + idx.clamp_min(0)], 0.0)
    y = (rows.float() * (here * recv_weights).sum(1, keepdim=True)).bfloat16()
    out = Combine.apply(y, buffer, handle)
    rng = torch.Generator().manual_seed(seed + 17)
    push = torch.randn(out.shape, generator=rng).bfloat16().to(rank.device)
    (out.float() * push.float()).sum().backward()
    rank.settle()
    dense_x, dense_w = own.x.double().requires_grad_(), own.weights.double().requires_grad_()
    chosen = torch.where(own.topk_idx >= 0, gains[own.topk_idx.clamp_min(0)], 0.0).double()
    dense = dense_x * (chosen * dense_w).sum(1, keepdim=True)
    (dense * push.double()).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert dense_x.grad is not None
    assert dense_w.grad is not None
    assert calc_diff(out, dense) < 2e-5  # BF16 three times on the way
    assert calc_diff(x.grad, dense_x.grad) < 2e-5
    if len(own.x):
        error = (weights.grad - dense_w.grad).norm() / dense_w.grad.norm().clamp_min(1e-9)
        assert float(error) < 1e-2
    buffer.destroy()


def test_forward_and_backward(pool: RankPool, seed: int) -> None:
    pool.run(gradients, seed)


def captured(rank: Rank, seed: int) -> None:
    """Worst-case dispatch and combine in a graph, replayed with other routes each time."""
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(False)
    rows, worst = SIZES.max_tokens, rank.num_ranks * SIZES.max_tokens
    everyone = draw(seed, SIZES, rank.num_ranks, full=True)
    combine(rank, buffer, dispatch(rank, buffer, everyone, SIZES, flow), flow)
    own = everyone[rank.rank].on(rank.device)

    def step() -> torch.Tensor:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            own.topk_idx, SIZES.num_experts
        )
        got, _, _, _, handle, _ = buffer.dispatch(
            own.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=own.topk_idx,
            topk_weights=own.weights,
            num_worst_tokens=worst,
        )
        return buffer.combine(got * 2, handle)[0]

    step()
    rank.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    rank.barrier()
    local = SIZES.num_experts // rank.num_ranks
    for turn in range(50):
        new = draw(seed + turn + 1, SIZES, rank.num_ranks, full=True)[rank.rank]
        for kept, fresh in ((own.x, new.x), (own.topk_idx, new.topk_idx)):
            kept.copy_(fresh)
        graph.replay()
        if turn % 10 == 0:
            sent = dispatch(rank, buffer, tokens(seed + turn, rank, SIZES), SIZES, flow)
            check_received(rank, sent)
        rank.settle()
        ranks = torch.where(new.topk_idx >= 0, new.topk_idx // local, -1)
        visits = torch.stack([(ranks == r).any(1) for r in range(rank.num_ranks)]).sum(0)
        assert calc_diff(out, 2 * new.x.double() * visits[:, None]) < 5e-6, f"replay {turn}"
    assert rows == len(own.x)
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.alone
def test_captured_worst_case_mode(gpu_pair: RankPool, seed: int) -> None:
    gpu_pair.run(captured, seed)
