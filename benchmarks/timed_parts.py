"""Commands run one after the other within a total time, each with a limit of its own.

Every part is sure of its share of the time. What it leaves goes to those after it, so that a part
which is slower on some machine takes nothing from the others, and the whole ends in time. Where the
time is less than all shares, the first parts keep theirs whole, and the last are left out: half a
part says little.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["passed", "failed", "timed out", "skipped", "no time"]

GRACE_S = 10.0  # of a part's limit, to end by itself when it is interrupted
FAILED_LINES = 60  # shown of a log whose part did not pass
NOTE_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command.

    name     names its log too
    share_s  seconds that are kept for it
    skip     why it does not run here; "": it does
    lines    how much of its output's end is shown when it passes
    """

    name: str
    command: tuple[str, ...]
    share_s: float
    skip: str = ""
    lines: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part. note: the last line that it wrote, or why it did not run."""

    name: str
    status: Status
    seconds: float
    note: str

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out", "no time")


def run_parts(
    parts: Sequence[Part],
    total_s: float,
    logs: Path,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Run all parts in order, their output in `logs`, progress through `say`.

    Ends within `total_s` seconds. A part for which no share could be kept runs all the same if
    those before it left enough.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + total_s
    shares = kept_shares(parts, total_s)
    outcomes = []
    for number, part in enumerate(parts):
        place = f"[{number + 1}/{len(parts)}] {part.name}"
        limit_s = max(0.0, ends - time.monotonic() - sum(shares[number + 1 :]))
        if part.skip:
            say(f"{place}: skipped: {part.skip}")
            outcomes.append(Outcome(part.name, "skipped", 0.0, part.skip))
        elif shares[number] == 0.0 and limit_s < part.share_s:
            why = f"it wants {part.share_s:.0f} s, {limit_s:.0f} are left"
            say(f"{place}: left out: {why}")
            outcomes.append(Outcome(part.name, "no time", 0.0, why))
        else:
            outcomes.append(_run(part, place, limit_s, logs, say))
    return outcomes


def kept_shares(parts: Sequence[Part], total_s: float) -> list[float]:
    """Seconds that are kept for each part: its share, as long as they fit, in order. 0: none. The
    first part that runs at all keeps what there is."""
    free_s, fits = total_s, True
    shares = []
    for part in parts:
        share_s = 0.0
        if not part.skip:
            is_first = free_s == total_s
            fits = fits and (is_first or part.share_s <= free_s)
            share_s = min(part.share_s, free_s) if fits else 0.0
        shares.append(share_s)
        free_s -= share_s
    return shares


def _run(part: Part, place: str, limit_s: float, logs: Path, say: Callable[[str], None]) -> Outcome:
    log = logs / f"{part.name}.log"
    say(f"{place}, at most {limit_s:.0f} s: {' '.join(part.command)}")
    began = time.monotonic()
    try:
        code = _command(part.command, log, limit_s)
    except OSError as error:
        say(f"    could not be started: {error}")
        return Outcome(part.name, "failed", 0.0, f"could not be started: {error}")
    seconds = time.monotonic() - began
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines()]
    status: Status = "timed out" if code is None else "failed" if code else "passed"
    for line in lines[-(part.lines if status == "passed" else FAILED_LINES) :]:
        say(f"    {line}")
    say(f"    {status} after {seconds:.0f} s, the whole output is in {log}")
    note = next((_bare(line) for line in reversed(lines) if _bare(line)), "no output")
    if code is None:
        note = f"ended at its limit; last line: {note}"
    elif code:
        note = f"exit status {code}; last line: {note}"
    return Outcome(part.name, status, seconds, note)


def _bare(line: str) -> str:
    """Without the rules that pytest draws around its last line."""
    return line.strip("= \t")[:NOTE_WIDTH]


def _command(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """The exit status; None where the limit ended the command. Nothing it started is left in its
    session."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    grace_s = min(GRACE_S, limit_s / 4)
    try:
        return process.wait(limit_s - grace_s)
    except subprocess.TimeoutExpired:
        _interrupt(process, grace_s)
        return None
    except BaseException:  # this program was told to end
        _interrupt(process, GRACE_S)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks that outlive their parent keep GPUs
        process.wait()


def _interrupt(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """As Ctrl-C does: tests report what they have, a benchmark ends its MPS daemon."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table of all parts."""
    rows = [("part", "seconds", "result", "")]
    rows += [(o.name, f"{o.seconds:.0f}", o.status, o.note) for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {status:<{widths[2]}}  {note}".rstrip()
        for name, seconds, status, note in rows
    )
