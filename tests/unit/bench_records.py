"""Records that several tests start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ep_runtime.bench.records import Case, Machine, Record
from ep_runtime.bench.stats import Summary

MACHINE = Machine(
    device="GPU",
    backend="cuda",
    commit="abc123",
    command="bench",
    torch="2",
    cuda="13",
    nccl="2.28",
    environment="",
)
CASE = Case(
    impl="ep_runtime",
    mode="fused",
    num_ranks=2,
    ranks_per_gpu=1,
    num_tokens=8,
    hidden=256,
    topk=2,
    num_experts=8,
    max_tokens=128,
    dispatch_format="fp8",
    recv_format="batched",
    num_sms=0,
    skew="uniform",
    pairs=50,
    replays=20,
)


def timed(
    median_us: float, op: str = "pair", more: dict[str, Any] | None = None, **fields: Any
) -> Record:
    """A record of CASE; `more` changes the case, `fields` the record."""
    summary = Summary(median_us, median_us - 0.5, median_us + 1)
    return Record.timed(
        replace(CASE, **(more or {})), MACHINE, op, summary, timing="graph", **fields
    )
