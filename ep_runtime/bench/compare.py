"""`python -m ep_runtime.bench compare old.json new.json`: did a change help, beyond the noise?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ep_runtime.bench.records import Case, Record, read_records
from ep_runtime.bench.report import wide_console


@dataclass(frozen=True, slots=True)
class Change:
    """One case and operation in both files. `clear`: their min-max ranges do not overlap."""

    case: Case
    op: str
    old_us: float
    new_us: float
    clear: bool

    @property
    def percent(self) -> float | None:
        """None where there is no ratio: what mode "hook" leaves exposed can be 0 or below."""
        return 100 * (self.new_us / self.old_us - 1) if self.old_us > 0 else None


def changes(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Cases that both have a time for, taken the same way on the same device, in the order of
    `new`."""
    before = {_key(record): record for record in old if record.status == "ok"}
    found = []
    for record in new:
        other = before.get(_key(record))
        if record.status == "ok" and other is not None:
            found.append(_change(other, record))
    return found


def not_comparable(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What to say about cases that both have a time for, but taken otherwise or elsewhere."""
    same = {_key(record) for record in old if record.status == "ok"}
    before = {(record.case, record.op): record for record in old if record.status == "ok"}
    told: Counter[str] = Counter()
    for record in new:
        other = before.get((record.case, record.op))
        if record.status != "ok" or other is None or _key(record) in same:
            continue
        pairs = zip(("timing", "device", "backend"), _how(other), _how(record), strict=True)
        told[", ".join(f"{name} {was} -> {now}" for name, was, now in pairs if was != now)] += 1
    return [f"{count} in both, but not comparable: {what}" for what, count in told.items()]


def main(old: Path, new: Path, console: Console | None = None) -> int:
    """Print the changes. Returns the exit status: 1 if the files have no case in common."""
    before, after = read_records(old), read_records(new)
    found = changes(before, after)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{old} -> {new}", title_justify="left")
    for name in ("E", "T", "wire", "implementation", "op", "old us", "new us", "change", ""):
        table.add_column(name, no_wrap=True, justify="right" if "us" in name else "left")
    for one in found:
        case = one.case
        title = " ".join(part for part in (case.impl, case.recv_format, case.mode) if part)
        percent = "-" if one.percent is None else f"{one.percent:+.1f}%"
        times = (f"{one.old_us:.2f}", f"{one.new_us:.2f}", percent)
        size = (str(case.num_experts), str(case.num_tokens), case.dispatch_format)
        table.add_row(*size, title, one.op, *times, "" if one.clear else "within the spread")
    console = console or wide_console()
    console.print(table if found else "no case is in both files, taken the same way")
    for text in not_comparable(before, after):
        console.print(text, markup=False, highlight=False)
    return int(not found)


def _how(record: Record) -> tuple[str, str, str]:
    """What times must share to be compared, besides the case."""
    return record.timing, record.machine.device, record.machine.backend


def _key(record: Record) -> tuple[Case, str, tuple[str, str, str]]:
    return record.case, record.op, _how(record)


def _change(old: Record, new: Record) -> Change:
    """Only called for records that have times."""
    old_us, new_us = old.median_us or 0.0, new.median_us or 0.0
    apart = (new.max_us or 0.0) < (old.min_us or 0.0) or (old.max_us or 0.0) < (new.min_us or 0.0)
    return Change(new.case, new.op, old_us, new_us, apart)
