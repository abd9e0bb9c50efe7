"""What else there is for thousands of tokens: NCCL's collectives, and DeepEP's normal kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.bench.session import Session
from ep_runtime.errors import BuildError

DEEP_EP_BYTES = 1 << 30

Runs = dict[str, Callable[[], object]]


def nccl_runs(session: Session, problem: NormalProblem) -> Runs:
    """All rows to all ranks, and a sum back: no routing, so more bytes, but no bookkeeping."""
    ranks, (tokens, hidden) = session.team.num_ranks, problem.inputs.x.shape
    parts = problem.rows if isinstance(problem.rows, tuple) else (problem.rows,)
    # Bytes: not every backend gathers FP8.
    sent = [part.contiguous().view(torch.uint8) for part in parts]
    got = [part.new_empty((ranks * tokens, part.shape[1])) for part in sent]
    y = torch.zeros((ranks * tokens, hidden), dtype=torch.bfloat16, device=session.device)
    out = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=session.device)

    def gather() -> None:
        for mine, everyones in zip(sent, got, strict=True):
            dist.all_gather_into_tensor(everyones, mine, group=session.group)

    def scatter() -> None:
        dist.reduce_scatter_tensor(out, y, group=session.group)

    def pair() -> None:
        gather()
        scatter()

    return {"dispatch": gather, "combine": scatter, "pair": pair}


def deep_ep_runs(session: Session, problem: NormalProblem, num_sms: int) -> Runs:
    """DeepEP's intranode kernels along a cached handle, which captures need. Raises BuildError."""
    try:
        deep_ep = importlib.import_module("deep_ep")
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"cannot be imported: {type(error).__name__}: {error}") from error
    deep_ep.Buffer.set_num_sms(num_sms)
    buffer: Any = deep_ep.Buffer(session.group, DEEP_EP_BYTES, 0)
    inputs = problem.inputs
    per_rank, per_node, per_expert, goes, _ = buffer.get_dispatch_layout(
        inputs.topk_idx, problem.sizes.num_experts
    )
    received, _, _, _, handle, _ = buffer.dispatch(
        problem.rows,
        topk_idx=inputs.topk_idx,
        topk_weights=inputs.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=goes,
        num_tokens_per_expert=per_expert,
    )
    rows = received[0] if isinstance(received, tuple) else received
    y = rows.bfloat16()

    def dispatch() -> object:
        return buffer.dispatch(problem.rows, handle=handle)

    def combine() -> object:
        return buffer.combine(y, handle)

    def pair() -> object:
        dispatch()
        return combine()

    return {"dispatch_cached": dispatch, "combine": combine, "pair": pair}
