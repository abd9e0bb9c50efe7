"""Records of the normal operations as lines, a table, a JSON file and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_records import NormalRecord, write_normal_records
from ep_runtime.bench.report import result_file

PLOTTED = ("dispatch", "dispatch_cached", "combine", "pair")


def publish(records: Sequence[NormalRecord], options: NormalOptions, console: Console) -> None:
    """Print the table; write the JSON and the plot where they are wanted."""
    if not records:
        return
    first = records[0]
    shared = f" ({first.ranks_per_gpu} share a GPU: no link)" if first.ranks_per_gpu > 1 else ""
    console.print(
        f"{first.num_ranks} ranks{shared}, {first.machine.device}, H={first.hidden}"
        f" K={first.topk} E={first.num_experts} skew={first.skew}; {first.repeats} operations,"
        f" median of {first.replays} at the slowest rank; commit {first.machine.commit}",
        markup=False,
        highlight=False,
    )
    console.print(table(records))
    for record in records:
        if record.status != "ok":
            console.print(f"{_name(record)}: {record.status}: {record.reason}", markup=False)
    if options.out is None:
        return
    path = result_path(options.out, records, options.label)
    write_normal_records(path, records)
    console.print(f"wrote {path}", markup=False)
    if options.plot:
        console.print(f"wrote {plot(records, path.with_suffix('.png'))}", markup=False)


def result_path(out: Path, records: Sequence[NormalRecord], label: str = "") -> Path:
    """normal-<device>-r<R>.json in `out`; "shared" where ranks share a GPU, a skew that is not
    uniform and a label follow. Raises ConfigError for a label that leaves nothing of itself."""
    first = records[0]
    return result_file(
        out, "normal", first.machine, first.num_ranks, first.ranks_per_gpu, first.skew, label
    )


def line(record: NormalRecord) -> str:
    """One record in one line, for progress."""
    return f"T={record.num_tokens} {record.dispatch_format} {_name(record)} {_us(record)}"


def table(records: Sequence[NormalRecord]) -> Table:
    """A row per record: time, GB/s by received rows (DeepEP's formula), GB/s over the wire."""
    made = Table(title="Normal operations", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("T", "wire", "implementation", "op", "timing", "SMs"):
        made.add_column(name, no_wrap=True)
    for name in ("us", "min-max", "GB/s received", "GB/s wire"):
        made.add_column(name, justify="right", no_wrap=True)
    for record in records:
        if record.status != "ok":
            continue
        made.add_row(
            str(record.num_tokens),
            record.dispatch_format,
            record.impl,
            record.op,
            record.timing,
            str(record.num_sms or "-"),
            _us(record),
            f"{record.min_us:.0f}-{record.max_us:.0f}",
            _rate(record.recv_gbs),
            _rate(record.wire_gbs),
        )
    return made


def plot(records: Sequence[NormalRecord], path: Path) -> Path:
    """Time over the number of SMs, a panel per operation and format; peers without one as lines."""
    good = [record for record in records if record.status == "ok"]
    formats = list(dict.fromkeys(record.dispatch_format for record in good))
    figure = Figure(figsize=(5 * len(PLOTTED), 4 * len(formats)), layout="constrained")
    for row, dispatch_format in enumerate(formats):
        for column, op in enumerate(PLOTTED):
            axes = figure.add_subplot(len(formats), len(PLOTTED), row * len(PLOTTED) + column + 1)
            here = [r for r in good if r.op == op and r.dispatch_format == dispatch_format]
            for key in dict.fromkeys((r.impl, r.timing, r.num_tokens) for r in here):
                mine = [r for r in here if (r.impl, r.timing, r.num_tokens) == key]
                label = f"{key[0]} {key[1]} T={key[2]}"
                points = sorted((r.num_sms, r.median_us) for r in mine if r.num_sms)
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", label=label)
                for record in mine:
                    if not record.num_sms and record.median_us is not None:
                        axes.axhline(record.median_us, linestyle=":", color="k", label=label)
            axes.set_title(f"{op}, {dispatch_format} rows")
            axes.set_xlabel("SMs")
            axes.set_ylabel("us (slowest rank, median)")
            axes.grid(visible=True, alpha=0.3)
            if here:
                axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _name(record: NormalRecord) -> str:
    sms = f" {record.num_sms} SMs" if record.num_sms else ""
    return f"{record.impl} {record.op} {record.timing}{sms}"


def _us(record: NormalRecord) -> str:
    return record.status if record.median_us is None else f"{record.median_us:.1f}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"
