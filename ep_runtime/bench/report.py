"""Records as a line of progress, as tables, as a JSON file and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ep_runtime.bench.machine import slug
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.records import Case, Machine, Record, write_records
from ep_runtime.bench.traffic import time_at
from ep_runtime.errors import ConfigError

OPS = ("pair", "dispatch", "combine")
OURS_PREFIX = "ep_runtime"
FILE_WIDTH = 150


def publish(records: Sequence[Record], options: LowLatencyOptions, console: Console) -> None:
    """Print the tables, the shortest last; write the JSON and the plot where they are wanted."""
    console.print(_heading(records), markup=False, highlight=False)
    for table in (summary_table(records), parts_table(records)):
        if table.row_count:
            console.print(table)
    for record in records:
        if record.status != "ok":
            console.print(
                f"{_title(record.case)} T={record.case.num_tokens} E={record.case.num_experts}"
                f" {record.op}: {record.status}: {record.reason}",
                markup=False,
                highlight=False,
            )
    for table in headlines(records):
        console.print(table)
    if options.out is None or not records:
        return
    path = result_path(options.out, records, options.label)
    write_records(path, records)
    console.print(f"wrote {path}", markup=False)
    if options.plot:
        console.print(f"wrote {plot(records, path.with_suffix('.png'))}", markup=False)


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def result_path(out: Path, records: Sequence[Record], label: str = "") -> Path:
    """low-latency-<device>-r<R>.json in `out`; "shared" where ranks share a GPU, a skew that is not
    uniform and a label follow. Raises ConfigError for a label that leaves nothing of itself."""
    machine, case = records[0].machine, records[0].case
    return result_file(
        out, "low-latency", machine, case.num_ranks, case.ranks_per_gpu, case.skew, label
    )


def result_file(
    out: Path,
    benchmark: str,
    machine: Machine,
    num_ranks: int,
    ranks_per_gpu: int,
    skew: str,
    label: str,
) -> Path:
    """The name that results of any benchmark get."""
    if label and not slug(label):  # else it would overwrite the file without a label
        raise ConfigError(f"label={label!r} has no letter of a-z and no digit; name it otherwise")
    shared = "shared" if ranks_per_gpu > 1 else ""
    skewed = "" if skew == "uniform" else skew
    parts = (benchmark, slug(machine.device), f"r{num_ranks}", shared, skewed, slug(label))
    return out / ("-".join(part for part in parts if part) + ".json")


def line(record: Record) -> str:
    """One record in one line, for progress."""
    case = record.case
    size = f"E={case.num_experts:<4} T={case.num_tokens:<5} {case.dispatch_format}"
    return f"{size} {_title(case):<42} {record.op} {_cell(record)}"


def headlines(records: Sequence[Record]) -> list[Table]:
    """Per (E, wire format): the pair's median, an implementation a row, T a column."""
    pairs = [record for record in records if record.op == "pair" and record.status != "absent"]
    tables = []
    for num_experts, wire in sorted({_panel(r.case) for r in pairs}, reverse=True):
        here = [r for r in pairs if _panel(r.case) == (num_experts, wire)]
        sizes = sorted({record.case.num_tokens for record in here})
        table = _table(f"Pair, us: E={num_experts}, {wire} dispatch{_no_link(here[0].case)}")
        table.add_column("implementation", no_wrap=True)
        for tokens in sizes:
            table.add_column(f"T={tokens}", justify="right")
        for title in dict.fromkeys(_title(record.case) for record in here):
            cells = {r.case.num_tokens: _cell(r) for r in here if _title(r.case) == title}
            table.add_row(title, *(cells.get(tokens, "-") for tokens in sizes))
        floors = {r.case.num_tokens: r.floor_us for r in here if r.floor_us is not None}
        if floors:
            cells = {tokens: f"{floor:.1f}" for tokens, floor in floors.items()}
            table.add_row("bytes at link speed", *(cells.get(tokens, "-") for tokens in sizes))
        tables.append(table)
    return tables


def summary_table(records: Sequence[Record]) -> Table:
    """A row per implementation and size: pair, dispatch, combine, and the pair beside its floor."""
    table = _table("Pair, dispatch and combine, us")
    for name in ("E", "T", "wire", "implementation"):
        table.add_column(name, justify="right" if len(name) == 1 else "left", no_wrap=True)
    columns = ("pair us", "min-max", "dispatch", "combine", "floor us", "of floor", "of link")
    for name in (*columns, "heap MB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for case, ops in _by_case(records, OPS):
        pair = ops.get("pair")
        if pair is not None and pair.status == "absent":
            continue
        table.add_row(
            *_size(case),
            _title(case),
            _cell(pair),
            _spread(pair),
            _cell(ops.get("dispatch")),
            _cell(ops.get("combine")),
            "-" if pair is None or pair.floor_us is None else f"{pair.floor_us:.1f}",
            _of_floor(pair),
            _of_link(pair),
            "-" if pair is None or pair.heap_bytes is None else f"{pair.heap_bytes / 1e6:.1f}",
            "-" if pair is None or pair.error is None else f"{pair.error:.0e}",
        )
    return table


def parts_table(records: Sequence[Record]) -> Table:
    """A row per implementation and size that has more than one launch an operation."""
    table = _table("Launch by launch, us (with events between them, so their sum exceeds the pair)")
    for name in ("E", "T", "wire", "implementation", "parts"):
        table.add_column(name, no_wrap=name != "parts")
    names = list(dict.fromkeys(r.op for r in records if r.status == "ok" and r.op not in OPS))
    for case, ops in _by_case(records, names):
        text = "  ".join(f"{name} {_cell(ops[name])}" for name in names if name in ops)
        table.add_row(*_size(case), _title(case), text)
    return table


def plot(records: Sequence[Record], path: Path) -> Path:
    """The pair's median over T, one panel per (E, wire format); returns `path`."""
    pairs = [record for record in records if record.op == "pair" and record.status == "ok"]
    panels = sorted({_panel(r.case) for r in pairs}, reverse=True)
    figure = Figure(figsize=(7.5 * max(1, len(panels)), 5), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        here = [r for r in pairs if _panel(r.case) == panel]
        for title in dict.fromkeys(_title(record.case) for record in here):
            points = sorted(
                (r.case.num_tokens, r.median_us) for r in here if _title(r.case) == title
            )
            ours = title.startswith(OURS_PREFIX)
            axes.plot(*zip(*points, strict=True), "o-" if ours else ".--", label=title)
        floor = sorted({(r.case.num_tokens, r.floor_us) for r in here if r.floor_us})
        if floor:
            axes.plot(*zip(*floor, strict=True), "k:", label="bytes at link speed")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens per rank")
        axes.set_ylabel("dispatch + combine, us (slowest rank, median)")
        axes.set_title(f"E={panel[0]}, {panel[1]} dispatch{_no_link(here[0].case)}")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _by_case(records: Sequence[Record], ops: Sequence[str]) -> list[tuple[Case, dict[str, Record]]]:
    """Records of `ops` by case, sizes in order, ours first."""
    cases: dict[Case, dict[str, Record]] = {}
    for record in records:
        if record.op in ops:
            cases.setdefault(record.case, {})[record.op] = record
    return sorted(
        cases.items(),
        key=lambda item: (
            -item[0].num_experts,
            item[0].dispatch_format,
            item[0].num_tokens,
            not item[0].impl.startswith(OURS_PREFIX),
        ),
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _panel(case: Case) -> tuple[int, str]:
    return case.num_experts, case.dispatch_format


def _size(case: Case) -> tuple[str, str, str]:
    return str(case.num_experts), str(case.num_tokens), case.dispatch_format


def _title(case: Case) -> str:
    return " ".join(part for part in (case.impl, case.recv_format, case.mode) if part)


def _heading(records: Sequence[Record]) -> str:
    if not records:
        return "nothing was measured"
    ours = next((r for r in records if r.case.impl == OURS_PREFIX), records[0])
    first, machine = ours.case, ours.machine
    timings = ", ".join(sorted({r.timing for r in records if r.op == "pair" and r.timing}))
    sms = first.num_sms or "all"
    return (
        f"{first.num_ranks} ranks{_no_link(first)}, {machine.device},"
        f" H={first.hidden} K={first.topk} M={first.max_tokens} skew={first.skew} SMs={sms};"
        f" {first.pairs} pairs, {timings or '-'},"
        f" median of {first.replays} at the slowest rank; commit {machine.commit}"
    )


def _no_link(case: Case) -> str:
    """What a reader must know before any number."""
    if case.ranks_per_gpu < 2:
        return ""
    return f" ({case.ranks_per_gpu} ranks share a GPU: no link is measured)"


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    return record.status if record.median_us is None else f"{record.median_us:.1f}"


def _spread(record: Record | None) -> str:
    if record is None or record.min_us is None:
        return "-"
    return f"{record.min_us:.1f}-{record.max_us:.1f}"


def _of_floor(record: Record | None) -> str:
    """How much of the time the bytes alone would take."""
    if record is None or not record.median_us or record.floor_us is None:
        return "-"
    return f"{100 * record.floor_us / record.median_us:.0f}%"


def _of_link(record: Record | None) -> str:
    """How much of the link's measured peak the implementation's own bytes took, on average."""
    if record is None or not record.median_us:
        return "-"
    if record.wire_bytes is None or record.link_gbs is None:
        return "-"
    return f"{100 * time_at(record.wire_bytes, record.link_gbs) / record.median_us:.0f}%"
