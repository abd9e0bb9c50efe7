"""One measured thing of the normal operations: a flat JSON object in a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ep_runtime.bench.records import Machine, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalRecord:
    """One number with all that is needed to repeat it.

    op            dispatch (layout and notify included), dispatch_cached, combine, pair
    timing        graph (replays of worst-case mode) or eager (exact mode, host clock)
    num_sms       most SMs; 0: not limited by us
    *_us          per operation; None unless status is "ok"
    recv_bytes    rows that a rank receives, its own included, times the bytes of a row, at the rank
                  that receives most: what DeepEP's tests divide by the time
    link_bytes    see ep_runtime.bench.traffic: what the busiest link has to carry
    """

    machine: Machine
    impl: str
    op: str
    timing: str
    dispatch_format: str
    num_sms: int
    num_ranks: int
    ranks_per_gpu: int
    num_tokens: int
    hidden: int
    topk: int
    num_experts: int
    skew: str
    repeats: int
    replays: int
    recv_bytes: float
    link_bytes: float
    link_gbs: float | None
    status: Status = "ok"
    reason: str = ""
    median_us: float | None = None
    min_us: float | None = None
    max_us: float | None = None

    @property
    def recv_gbs(self) -> float | None:
        """GB/s by received rows, local ones included."""
        return None if not self.median_us else self.recv_bytes / self.median_us / 1e3

    @property
    def wire_gbs(self) -> float | None:
        """GB/s over the busiest link; None where ranks share a GPU and there is none."""
        if not self.median_us or self.ranks_per_gpu > 1:
            return None
        return self.link_bytes / self.median_us / 1e3

    def to_json(self) -> dict[str, Any]:
        """Flat, with the two rates."""
        values = asdict(self)
        machine = values.pop("machine")
        return {**values, "recv_gbs": self.recv_gbs, "wire_gbs": self.wire_gbs, **machine}


def write_normal_records(path: Path, records: Sequence[NormalRecord]) -> None:
    """Write a JSON list, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps([record.to_json() for record in records], indent=1) + "\n")
    partial.replace(path)
