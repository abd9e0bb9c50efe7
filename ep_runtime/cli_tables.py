"""What the commands print: tables for people. JSON is each command's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ep_runtime.decoding import DecodeResult
    from ep_runtime.doctor import Finding

STYLES = {"ok": "green", "note": "cyan", "missing": "dim", "problem": "bold red"}


def decode_table(result: DecodeResult, *, on_graphs: bool) -> Table:
    """One row per measure; a second column where the steps were also run eagerly."""
    runs = [result.report] + ([result.eager] if result.eager is not None else [])
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    # CPU ranks record a step's calls and make them again, which saves them nothing.
    for title in ("graph replay" if on_graphs else "replay", "eager")[: len(runs)]:
        table.add_column(title, justify="right")
    table.add_row("decoded tokens", *(f"{r.num_tokens:,}" for r in runs))
    table.add_row("tokens/s", *(f"{r.tokens_per_second:,.0f}" for r in runs))
    table.add_row("steps", *(f"{len(r.step_us):,}" for r in runs))
    table.add_row("time per step (median)", *(f"{r.step_median_us:,.0f} us" for r in runs))
    for bucket, launches in sorted(result.report.launches.items()):
        name = f"replays of all ranks, bucket {bucket} ({launches} launches each)"
        table.add_row(name, *(f"{r.replays.get(bucket, 0):,}" for r in runs))
    table.add_row("dispatched", *(f"{r.bytes_dispatched:,} B" for r in runs))
    table.add_row("combined", *(f"{r.bytes_combined:,} B" for r in runs))
    return table


def finding_table(title: str, findings: Sequence[Finding]) -> Table:
    """Name, status, and what was found, with the advice on a line of its own."""
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    table.add_column("")
    table.add_column("", overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.value))
        if finding.advice:
            table.add_row("", "", Text(f"-> {finding.advice}", style="italic"))
    return table
