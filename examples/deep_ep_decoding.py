"""Two micro-batches of decoding through a mixture-of-experts layer, with DeepEP's hooks.

    python -m ep_runtime.integrations.deep_ep examples/deep_ep_decoding.py --ranks 2

Nothing here knows of ep_runtime: where DeepEP is installed, `python examples/deep_ep_decoding.py`
runs on that (with one GPU per rank, and H=7168). Results are compared with a layer that has all
experts.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deep_ep import Buffer
from torch.multiprocessing.spawn import spawn

Hook = Callable[[], None]
EXPERTS, TOPK, MAX_TOKENS = 16, 4, 32

_buffer: Buffer | None = None


def get_buffer(group: dist.ProcessGroup, hidden: int) -> Buffer:
    """One buffer for the whole run."""
    global _buffer
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
        MAX_TOKENS, hidden, group.size(), EXPERTS
    )
    if _buffer is None or _buffer.num_rdma_bytes < num_rdma_bytes:
        _buffer = Buffer(
            group,
            0,
            num_rdma_bytes,
            low_latency_mode=True,
            num_qps_per_rank=EXPERTS // group.size(),
        )
    return _buffer


def dispatch(x: torch.Tensor, idx: torch.Tensor) -> tuple[Any, torch.Tensor, Any, Hook]:
    """Send now; rows are valid after the hook was called. No SM is held in between."""
    assert _buffer is not None
    rows, counts, handle, _event, hook = _buffer.low_latency_dispatch(
        x, idx, MAX_TOKENS, EXPERTS, use_fp8=True, async_finish=False, return_recv_hook=True
    )
    return rows, counts, handle, hook


def combine(
    y: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, handle: Any
) -> tuple[torch.Tensor, Hook]:
    assert _buffer is not None
    out, _event, hook = _buffer.low_latency_combine(
        y, idx, weights, handle, async_finish=False, return_recv_hook=True
    )
    return out, hook


def run_experts(
    rows: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """A batched GEMM over all slots; what lies behind the counts is never read by combine."""
    values, scales = rows
    x = values.float() * scales.repeat_interleave(128, dim=-1)
    used = torch.arange(x.shape[1], device=x.device)[None, :] < counts[:, None]
    return torch.bmm(torch.where(used[..., None], x, 0.0), experts).bfloat16()


class MicroBatch:
    """Half of this rank's tokens."""

    def __init__(self, tokens: int, hidden: int, device: torch.device) -> None:
        self.x = torch.randn(tokens, hidden, device=device).bfloat16()
        chosen = torch.rand(tokens, EXPERTS, device=device).softmax(1).topk(TOPK)
        self.idx, self.weights = chosen.indices, chosen.values

    def wanted(self, experts: torch.Tensor) -> torch.Tensor:
        """The layer with all experts in one place."""
        out = torch.zeros(self.x.shape, device=self.x.device)
        for k in range(TOPK):
            gained = torch.bmm(self.x.float()[:, None], experts[self.idx[:, k]])[:, 0]
            out += self.weights[:, k, None] * gained
        return out


def two_batches(a: MicroBatch, b: MicroBatch, experts: torch.Tensor) -> list[torch.Tensor]:
    """Each micro-batch's rows travel while the other one computes."""
    rows_a, counts_a, handle_a, receive = dispatch(a.x, a.idx)
    receive()
    rows_b, counts_b, handle_b, receive = dispatch(b.x, b.idx)
    y_a = run_experts(rows_a, counts_a, experts)  # while b's rows travel
    receive()
    out_a, receive = combine(y_a, a.idx, a.weights, handle_a)
    y_b = run_experts(rows_b, counts_b, experts)  # while a's results travel
    receive()
    out_b, receive = combine(y_b, b.idx, b.weights, handle_b)
    receive()
    return [out_a, out_b]


def main(rank: int, num_ranks: int, port: int, hidden: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    get_buffer(dist.new_group(list(range(num_ranks))), hidden)
    torch.manual_seed(0)  # the same experts everywhere
    experts = (torch.randn(EXPERTS, hidden, hidden) / hidden**0.5).to(device)
    local = EXPERTS // num_ranks
    torch.manual_seed(1 + rank)
    for step in range(3):
        batches = [MicroBatch(MAX_TOKENS - step - i, hidden, device) for i in range(2)]
        outs = two_batches(batches[0], batches[1], experts[rank * local : (rank + 1) * local])
        for batch, out in zip(batches, outs, strict=True):
            wanted = batch.wanted(experts)
            error = float((out.float() - wanted).norm() / wanted.norm())
            assert error < 5e-2, error
            if step == 2:
                print(f"rank {rank}: {len(out)} tokens, relative error {error:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    ranks, hidden = arguments.ranks, arguments.hidden
    spawn(main, args=(ranks, free_port, hidden), nprocs=ranks)  # type: ignore[no-untyped-call]
