"""`ep-runtime bench link`: what a plain copy between two GPUs reaches, as a ceiling."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from ep_runtime.bench.clock import timing_event
from ep_runtime.bench.machine import git_commit, slug
from ep_runtime.bench.options import HELP
from ep_runtime.bench.out import make_folder
from ep_runtime.errors import BuildError, ConfigError

COPY_BYTES = 256 << 20
REPEATS = 10
LINK_HELP = HELP | {
    "num_bytes": "Bytes of one copy.",
    "repeats": "How often a copy between two GPUs is timed.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """LINK_HELP says what they mean; out None: nothing is written, commit None: asked of git."""

    num_bytes: int = COPY_BYTES
    repeats: int = REPEATS
    out: Path | None = Path("benchmarks/results")
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_bytes", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRecord:
    """GB/s (1e9 bytes a second) of copies from GPU `source` to GPU `target` by the copy engine."""

    impl: str
    op: str
    source: int
    target: int
    num_bytes: int
    median_gbs: float
    min_gbs: float
    max_gbs: float
    device: str
    commit: str


def copy_rates(source: int, target: int, num_bytes: int, repeats: int) -> list[float]:
    """GB/s of each of `repeats` copies, timed with events on the source's stream."""
    x = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", source))
    y = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", target))
    x.random_()
    y.copy_(x)  # sets up peer access
    torch.cuda.synchronize(target)
    rates = []
    with torch.cuda.device(source):
        for _ in range(repeats):
            start, end = timing_event(), timing_event()
            start.record()
            y.copy_(x, non_blocking=True)
            end.record()
            end.synchronize()
            rates.append(num_bytes / start.elapsed_time(end) / 1e6)
    return rates


def link_rate(device: torch.device) -> float | None:
    """GB/s from `device` to the next GPU that this process sees; None if it sees no other."""
    count = torch.cuda.device_count()
    if count < 2:
        return None
    source = torch.cuda.current_device() if device.index is None else device.index
    return median(copy_rates(source, (source + 1) % count, COPY_BYTES, REPEATS))


def run(options: LinkOptions) -> list[LinkRecord]:
    """Copy between every ordered pair of GPUs, one pair at a time."""
    count = torch.cuda.device_count()
    if count < 2:
        raise BuildError(
            f"bench link copies between GPUs and this process sees {count}; check"
            " CUDA_VISIBLE_DEVICES, or run it on a machine with two"
        )
    commit = options.commit or git_commit()
    records = []
    for source in range(count):
        for target in (other for other in range(count) if other != source):
            rates = copy_rates(source, target, options.num_bytes, options.repeats)
            records.append(
                LinkRecord(
                    impl="torch-copy",
                    op="copy",
                    source=source,
                    target=target,
                    num_bytes=options.num_bytes,
                    median_gbs=median(rates),
                    min_gbs=min(rates),
                    max_gbs=max(rates),
                    device=torch.cuda.get_device_name(source),
                    commit=commit,
                )
            )
    return records


def main(options: LinkOptions, console: Console | None = None) -> int:
    """Run, print a table, write the JSON. Returns the exit status."""
    console = console or Console()
    make_folder(options.out)
    records = run(options)
    table = Table("from", "to", "GB/s median", "min", "max", title="Copies between GPUs")
    for record in records:
        rates = (record.median_gbs, record.min_gbs, record.max_gbs)
        table.add_row(str(record.source), str(record.target), *(f"{rate:.1f}" for rate in rates))
    console.print(table)
    if options.out is not None:
        path = options.out / f"link-{slug(records[0].device)}.json"
        path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
        console.print(f"wrote {path}")
    return 0
