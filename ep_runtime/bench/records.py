"""One measured (or failed, or absent) thing: a flat JSON object in a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ep_runtime.bench.stats import Summary
from ep_runtime.errors import ConfigError

Status = Literal["ok", "wrong", "failed", "absent"]
STATUSES: tuple[Status, ...] = ("ok", "wrong", "failed", "absent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and from what a run was made; the same in all its records."""

    device: str
    backend: str
    commit: str
    command: str
    torch: str
    cuda: str
    nccl: str
    environment: str  # variables that change what NCCL does, as NAME=value


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One implementation at one size. ranks_per_gpu: above 1 no link was measured."""

    impl: str
    mode: str
    num_ranks: int
    ranks_per_gpu: int
    num_tokens: int
    hidden: int
    topk: int
    num_experts: int
    max_tokens: int
    dispatch_format: str
    recv_format: str
    num_sms: int
    skew: str
    pairs: int
    replays: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One number with all that is needed to repeat it.

    op           pair, dispatch, combine, or a part: dispatch_send, dispatch_recv, ...
    timing       how: "graph" (period of a graph), "graph-events" (events between its nodes),
                 "eager" (host clock); "" without a time
    *_us         None unless status is "ok": an implementation that was not right has no time
    error        largest relative error per 128 channels in the check before the timing
    link_bytes   see ep_runtime.bench.traffic; floor_us is their time at link_gbs; None for parts
    wire_bytes   what this implementation itself sends in that direction, where it is known
    compute_us   mode "hook": the other work, already subtracted from the times
    """

    case: Case
    machine: Machine
    op: str
    timing: str = ""
    status: Status = "ok"
    reason: str = ""
    error: float | None = None
    median_us: float | None = None
    min_us: float | None = None
    max_us: float | None = None
    compute_us: float | None = None
    link_bytes: float | None = None
    wire_bytes: float | None = None
    link_gbs: float | None = None
    floor_us: float | None = None
    heap_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigError(f"status={self.status!r}: use one of {', '.join(STATUSES)}")
        if (self.status == "ok") != (self.median_us is not None):
            raise ConfigError(
                f"status={self.status!r} with median_us={self.median_us}: a record has a time"
                " exactly when it is ok; build it with Record.timed or Record.without_time"
            )
        if self.status != "ok" and not self.reason:
            raise ConfigError(f"status={self.status!r} without a reason: say what happened")

    @classmethod
    def timed(cls, case: Case, machine: Machine, op: str, times: Summary, **more: Any) -> Record:
        """A measurement of a correct implementation."""
        return cls(
            case=case,
            machine=machine,
            op=op,
            median_us=times.median_us,
            min_us=times.min_us,
            max_us=times.max_us,
            **more,
        )

    @classmethod
    def without_time(
        cls,
        case: Case,
        machine: Machine,
        op: str,
        status: Status,
        reason: str,
        error: float | None = None,
    ) -> Record:
        """Why there is no time: wrong results, a failure, or a peer that is not there."""
        return cls(case=case, machine=machine, op=op, status=status, reason=reason, error=error)

    def to_json(self) -> dict[str, Any]:
        """Flat: the fields of the case and of the machine lie beside the others."""
        values = asdict(self)
        case, machine = values.pop("case"), values.pop("machine")
        return {**case, **values, **machine}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """The inverse of to_json. Raises ConfigError for a field too many or too few."""
        own = {f.name for f in fields(cls)} - {"case", "machine"}
        case, machine = ({f.name for f in fields(part)} for part in (Case, Machine))
        odd = sorted(set(values) ^ (own | case | machine))
        if odd:
            raise ConfigError(
                f"record fields {', '.join(odd)} are missing or unknown; write the file again"
                " with this version's `ep-runtime bench`"
            )
        return cls(
            case=Case(**{name: values[name] for name in case}),
            machine=Machine(**{name: values[name] for name in machine}),
            **{name: values[name] for name in own},
        )


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write a JSON list, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps([record.to_json() for record in records], indent=1) + "\n")
    partial.replace(path)


def read_records(path: Path) -> list[Record]:
    """Read what write_records wrote. Raises ConfigError for a file that it did not write."""
    try:
        return [Record.from_json(values) for values in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no records of a benchmark ({type(error).__name__}: {error}); give a JSON"
            " file that `ep-runtime bench` wrote"
        ) from error
