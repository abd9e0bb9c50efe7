"""What else there is for thousands of tokens: NCCL's collectives, and DeepEP's normal kernels."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.bench.routing import Sizes
from ep_runtime.bench.session import Session
from ep_runtime.bench.team import Team
from ep_runtime.errors import BuildError

DEEP_EP_BYTES = 1 << 30
HOP_ERROR = 2**-8  # of the terms' magnitude: twice what rounding a partial sum to BF16 costs

Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Peer:
    """Operations to time by name, and `check`: run them; what is wrong on this rank, or "".

    Both are collective, and `check` may use the team.
    """

    runs: Runs
    check: Callable[[], str]


def nccl_peer(session: Session, problem: NormalProblem) -> Peer:
    """All rows to all ranks, and a sum back: no routing, so more bytes, but no bookkeeping.

    A collective has one size on all ranks: a rank without tokens sends zeros.
    """
    sizes, team = problem.sizes, session.team
    ranks, tokens, hidden = sizes.num_ranks, sizes.num_tokens, sizes.hidden
    parts = problem.rows if isinstance(problem.rows, tuple) else (problem.rows,)
    sent = [_padded(part, tokens) for part in parts]
    got = [part.new_empty((ranks * tokens, part.shape[1])) for part in sent]
    terms = [_terms(sizes, team.rank, to, session.device) for to in range(ranks)]
    y = torch.cat(terms)
    out = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=session.device)

    def gather() -> None:
        for mine, everyones in zip(sent, got, strict=True):
            dist.all_gather_into_tensor(everyones, mine, group=session.group)

    def scatter() -> None:
        dist.reduce_scatter_tensor(out, y, group=session.group)

    def pair() -> None:
        gather()
        scatter()

    def check() -> str:
        for everyones in got:
            everyones.fill_(0xFF)
        out.fill_(float("nan"))
        pair()
        wrong = _wrong_gather(team, sent, got)  # on every rank: it is collective
        return wrong or _wrong_scatter(sizes, team.rank, out)

    return Peer({"dispatch": gather, "combine": scatter, "pair": pair}, check)


def deep_ep_peer(session: Session, problem: NormalProblem, num_sms: int) -> Peer:
    """DeepEP's intranode kernels in worst-case mode, which captures need. Raises BuildError.

    As ours, `dispatch` and `pair` find out the layout and exchange counts; `dispatch_cached` goes
    along the handle of an earlier dispatch.
    """
    try:
        deep_ep = importlib.import_module("deep_ep")
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"cannot be imported: {type(error).__name__}: {error}") from error
    deep_ep.Buffer.set_num_sms(num_sms)
    buffer: Any = deep_ep.Buffer(session.group, DEEP_EP_BYTES, 0)
    inputs, sizes = problem.inputs, problem.sizes

    def send() -> tuple[Any, Any]:
        """Received rows (or rows and scales), and the handle."""
        per_rank, per_node, per_expert, goes, _ = buffer.get_dispatch_layout(
            inputs.topk_idx, sizes.num_experts
        )
        received, _, _, _, made, _ = buffer.dispatch(
            problem.rows,
            topk_idx=inputs.topk_idx,
            topk_weights=inputs.topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=sizes.num_ranks * sizes.num_tokens,
        )
        return received, made

    first, handle = send()
    y = _values(first)[0].bfloat16()
    del first

    def cached() -> object:
        return buffer.dispatch(problem.rows, handle=handle)[0]

    def combine() -> object:
        return buffer.combine(y, handle)

    def pair() -> object:
        return buffer.combine(y, send()[1])

    def check() -> str:
        received, made = send()
        again = cached()
        out = buffer.combine(_values(received)[0].bfloat16(), made)[0]
        wrong = problem.wrong_rows(*_values(received)) or problem.wrong_rows(*_values(again))
        return wrong or problem.wrong_sum(out)

    runs: Runs = {"dispatch": send, "dispatch_cached": cached, "combine": combine, "pair": pair}
    return Peer(runs, check)


def _values(received: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows, and scales where there are some."""
    rows, scales = received if isinstance(received, tuple) else (received, None)
    return rows, scales


def _padded(part: torch.Tensor, tokens: int) -> torch.Tensor:
    """Its rows as bytes (not every backend gathers FP8), zeros behind them up to `tokens` rows."""
    rows = part.contiguous().view(torch.uint8)
    padded = rows.new_zeros((tokens, rows.shape[1]))
    padded[: rows.shape[0]] = rows
    return padded


def _wrong_gather(team: Team, sent: list[torch.Tensor], got: list[torch.Tensor]) -> str:
    """Every rank tells the digests of what it sent; do the gathered bytes have them? Collective."""
    told = team.gather([_digest(part) for part in sent])
    arrived = [[_digest(rows) for rows in part.chunk(team.num_ranks)] for part in got]
    for source, digests in enumerate(told):
        if digests != [of_part[source] for of_part in arrived]:
            return f"gathered rows differ from what rank {source} sent"
    return ""


def _digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.cpu().flatten().numpy().data).hexdigest()


def _terms(sizes: Sizes, source: int, to: int, device: torch.device) -> torch.Tensor:
    """What rank `source` adds to the sum of rank `to`, bf16 [T, H]: every rank can make it.

    A random column times a random row: cheap, and no two rows, nor two ranks' terms, are alike.
    """
    generator = torch.Generator().manual_seed(source * sizes.num_ranks + to)
    column = torch.randn(sizes.num_tokens, 1, generator=generator).to(device)
    row = torch.randn(1, sizes.hidden, generator=generator).to(device)
    return (column * row).bfloat16()


def _wrong_scatter(sizes: Sizes, rank: int, out: torch.Tensor) -> str:
    """Is `out` the sum of all ranks' terms, in FP32, but for a rounding to BF16 at every hop?"""
    total = torch.zeros_like(out, dtype=torch.float32)
    magnitude = torch.zeros_like(total)
    for source in range(sizes.num_ranks):
        term = _terms(sizes, source, rank, out.device).float()
        total += term
        magnitude += term.abs()
    near = (out.float() - total).abs() <= sizes.num_ranks * HOP_ERROR * magnitude  # NaN is not
    return "" if bool(near.all()) else "scattered rows differ from the ranks' sum"
