"""A mixture-of-experts layer for training, written for DeepEP's normal calls.

    python -m ep_runtime.integrations.deep_ep examples/deep_ep_training.py --ranks 2

Nothing here knows of ep_runtime: where DeepEP is installed, `python examples/deep_ep_training.py`
runs on that (with one GPU per rank). The layer is compared with one that has all experts.
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from deep_ep import Buffer, EventOverlap
from deep_ep.utils import EventHandle
from torch.multiprocessing.spawn import spawn

EXPERTS, TOPK, HIDDEN, TOKENS = 16, 4, 512, 200

_buffer: Buffer | None = None


def get_buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Buffer:
    """One buffer for the whole run, large enough for both directions."""
    global _buffer
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (
        Buffer.get_dispatch_config(group.size()),
        Buffer.get_combine_config(group.size()),
    ):
        nvl = config.get_nvl_buffer_size_hint(hidden_bytes, group.size())
        rdma = config.get_rdma_buffer_size_hint(hidden_bytes, group.size())
        num_nvl_bytes, num_rdma_bytes = max(nvl, num_nvl_bytes), max(rdma, num_rdma_bytes)
    if _buffer is None or _buffer.num_nvl_bytes < num_nvl_bytes:
        _buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _buffer


class MoeDispatch(torch.autograd.Function):
    """Tokens go to the ranks of their experts; gradients come back by a combine."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, group: Any
    ) -> Any:
        buffer = get_buffer(group, x.size(1) * x.element_size())
        # Everything from here on runs on the communication stream, behind what made x.
        event = EventOverlap(EventHandle())
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            idx, EXPERTS, previous_event=event, async_finish=True, allocate_on_comm_stream=True
        )
        rows, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_idx)
        return rows, recv_idx, recv_weights, counts, handle

    @staticmethod
    def backward(
        ctx: Any, grad_rows: torch.Tensor, _idx: Any, grad_weights: torch.Tensor, *_: Any
    ) -> Any:
        grad_x, grad_topk_weights, event = ctx.buffer.combine(
            grad_rows.contiguous(),
            ctx.handle,
            topk_weights=grad_weights.float(),
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_x, None, grad_topk_weights, None


class MoeCombine(torch.autograd.Function):
    """Rows come home and are summed; gradients go out by a dispatch over the same handle."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, buffer: Buffer, handle: Any) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        out, _, event = buffer.combine(rows, handle, async_finish=True)
        event.current_stream_wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, _, _, _, _, event = ctx.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, async_finish=True
        )
        event.current_stream_wait()
        return rows, None, None


def run_experts(
    rows: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over the local experts of each row; experts [L, H, H]."""
    out = torch.zeros(rows.shape, device=rows.device)
    for number, expert in enumerate(experts):
        token, entry = (idx == number).nonzero(as_tuple=True)
        gained = (rows[token].float() @ expert) * weights[token, entry, None]
        out = out.index_add(0, token, gained)
    return out.bfloat16()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().float(), wanted.detach().float()
    return float((got - wanted).norm() / wanted.norm())


def train_step(rank: int, num_ranks: int, group: dist.ProcessGroup, device: torch.device) -> None:
    torch.manual_seed(0)  # the same experts everywhere
    experts = (torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5).to(device).requires_grad_()
    torch.manual_seed(1 + rank)
    tokens = TOKENS - 10 * rank
    x = torch.randn(tokens, HIDDEN, device=device).bfloat16().requires_grad_()
    chosen = torch.rand(tokens, EXPERTS, device=device).softmax(1).topk(TOPK)
    weights = chosen.values.detach().clone().requires_grad_()
    push = torch.randn(tokens, HIDDEN, device=device)

    local = EXPERTS // num_ranks
    dispatched: Any = MoeDispatch.apply(x, chosen.indices, weights, group)  # type: ignore[no-untyped-call]
    rows, idx, recv_weights, counts, handle = dispatched
    mine = experts[rank * local : (rank + 1) * local]
    assert _buffer is not None
    y = run_experts(rows, idx, recv_weights, mine)
    out: Any = MoeCombine.apply(y, _buffer, handle)  # type: ignore[no-untyped-call]
    grads = torch.autograd.grad((out.float() * push).sum(), (x, weights))

    dense = run_experts(x, chosen.indices, weights, experts)
    wanted = torch.autograd.grad((dense.float() * push).sum(), (x, weights))
    errors = [relative(out, dense), *(relative(g, w) for g, w in zip(grads, wanted, strict=True))]
    assert max(errors) < 2e-2, errors
    print(
        f"rank {rank}: {len(rows)} rows for {sum(counts)} (row, expert) pairs; relative errors of"
        f" output, x.grad and weights.grad: {', '.join(f'{e:.1e}' for e in errors)}",
        flush=True,
    )


def main(rank: int, num_ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    group = dist.new_group(list(range(num_ranks)))
    for _ in range(3):
        train_step(rank, num_ranks, group, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    spawn(main, args=(ranks, free_port), nprocs=ranks)  # type: ignore[no-untyped-call]
