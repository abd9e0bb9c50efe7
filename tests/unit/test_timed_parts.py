"""Parts of a timed run: passing, failing, skipped, too slow, and what they leave behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import timed_parts
from benchmarks.timed_parts import Outcome, Part, run_parts, summary


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timed_parts, "GRACE_S", 1.0)
    # Tests that were started in the background ignore SIGINT, and what they start would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def part(name: str, script: str, share_s: float = 5.0, **more: object) -> Part:
    command = (sys.executable, "-c", script)
    return Part(**{"name": name, "command": command, "share_s": share_s, **more})  # type: ignore[arg-type]


def run(tmp_path: Path, *parts: Part, total_s: float = 60.0) -> tuple[list[Outcome], str]:
    said: list[str] = []
    outcomes = run_parts(parts, total_s, tmp_path / "logs", said.append)
    return outcomes, "\n".join(said)


def test_each_part_is_reported_and_a_failure_ends_nothing_else(tmp_path: Path) -> None:
    outcomes, said = run(
        tmp_path,
        part("good", "print('early'); print('==== 3 passed in 1s ====')"),
        part("bad", "print('why'); raise SystemExit(3)"),
        part("left-out", "raise SystemExit(1)", skip="no such thing here"),
        Part(name="absent", command=("/no/such/program",), share_s=5.0),
        part("last", "import sys; print('to stderr', file=sys.stderr)"),
    )
    found = [(o.name, o.status, o.bad) for o in outcomes]
    assert found == [
        ("good", "passed", False),
        ("bad", "failed", True),
        ("left-out", "skipped", False),
        ("absent", "failed", True),
        ("last", "passed", False),
    ]
    assert outcomes[0].note == "3 passed in 1s"
    assert outcomes[1].note == "exit status 3; last line: why"
    assert outcomes[2].note == "no such thing here"
    assert "/no/such/program" in outcomes[3].note
    assert outcomes[4].note == "to stderr"
    assert (tmp_path / "logs" / "good.log").read_text().startswith("early\n")
    assert "[2/5] bad, at most" in said
    assert "    why\n" in said


def test_only_the_end_of_a_passing_parts_output_is_shown(tmp_path: Path) -> None:
    _, said = run(tmp_path, part("long", "for i in range(9): print(f'line {i}')", lines=2))
    assert "line 7\n    line 8" in said
    assert "line 6" not in said


def test_a_part_that_is_too_slow_is_interrupted_and_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_parts, "GRACE_S", 10.0)
    script = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up", flush=True)
"""
    began = time.monotonic()
    # A quarter of it is for the part to end itself: enough on a busy machine too.
    outcomes, said = run(tmp_path, part("slow", script), total_s=12.0)
    assert time.monotonic() - began < 18
    assert (outcomes[0].status, outcomes[0].bad) == ("timed out", True)
    assert outcomes[0].note == "ended at its limit; last line: cleaned up"
    assert "    begun\n" in said


def test_a_part_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path: Path) -> None:
    number = tmp_path / "child"
    script = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(number)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    began = time.monotonic()
    outcomes, _ = run(tmp_path, part("stubborn", script), total_s=4.0)
    assert time.monotonic() - began < 8
    assert outcomes[0].status == "timed out"
    assert gone(int(number.read_text()))


def test_children_of_a_part_that_ended_are_killed_too(tmp_path: Path) -> None:
    """A rank that outlives a crashed run would keep its GPU from the next part."""
    script = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
raise SystemExit(1)
"""
    outcomes, _ = run(tmp_path, part("crashed", script))
    assert outcomes[0].status == "failed"
    assert gone(int(outcomes[0].note.split()[-1]))


def gone(pid: int) -> bool:
    """Does the process end within a moment? A zombie that nobody waits for counts as ended."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    os.kill(pid, 9)
    return False


def test_a_part_may_use_what_others_left_but_never_their_shares(tmp_path: Path) -> None:
    """12 s in all: the first may take 8 of them; skipped parts keep nothing."""
    outcomes, said = run(
        tmp_path,
        part("first", "pass", share_s=4.0),
        part("skipped", "pass", share_s=100.0, skip="no"),
        part("second", "pass", share_s=4.0),
        total_s=12.0,
    )
    assert [o.status for o in outcomes] == ["passed", "skipped", "passed"]
    assert "first, at most 8 s" in said
    second = float(said.split("second, at most ")[1].split()[0])
    assert 8 < second <= 12


def test_where_time_is_short_the_first_parts_keep_their_shares_and_the_last_are_left_out(
    tmp_path: Path,
) -> None:
    """Of 60 s 20 and 30 are kept. What the first two leave is enough for the fourth only."""
    outcomes, said = run(
        tmp_path,
        part("a", "pass", share_s=20.0),
        part("b", "pass", share_s=30.0),
        part("long", "pass", share_s=90.0),
        part("d", "pass", share_s=15.0),
    )
    found = [(o.name, o.status, o.bad) for o in outcomes]
    assert found == [
        ("a", "passed", False),
        ("b", "passed", False),
        ("long", "no time", True),
        ("d", "passed", False),
    ]
    assert "a, at most 30 s" in said
    assert "[3/4] long: left out: it wants 90 s, " in said


@pytest.mark.parametrize(
    ("total_s", "kept"),
    [
        (100.0, [30.0, 0.0, 50.0, 20.0]),
        (99.0, [30.0, 0.0, 50.0, 0.0]),
        (79.0, [30.0, 0.0, 0.0, 0.0]),  # not the last one either: order is importance
        (10.0, [10.0, 0.0, 0.0, 0.0]),
    ],
)
def test_shares_are_kept_whole_in_order(total_s: float, kept: list[float]) -> None:
    parts = [
        part("a", "pass", share_s=30.0),
        part("skipped", "pass", share_s=99.0, skip="no"),
        part("c", "pass", share_s=50.0),
        part("d", "pass", share_s=20.0),
    ]
    assert timed_parts.kept_shares(parts, total_s) == kept


def test_what_ends_the_program_ends_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Stopped(timed_parts.subprocess.Popen):  # type: ignore[type-arg,misc]
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self.pid)
                raise SystemExit(143)
            return int(super().wait(timeout))

    monkeypatch.setattr(timed_parts.subprocess, "Popen", Stopped)
    with pytest.raises(SystemExit):
        run(tmp_path, part("long", "import time; time.sleep(60)"))
    assert gone(started[0])


def test_the_summary_has_a_line_for_every_part() -> None:
    table = summary(
        [Outcome("suite", "passed", 12.4, "9 passed"), Outcome("replay", "timed out", 80.0, "x")]
    )
    assert table.splitlines() == [
        "part    seconds  result",
        "suite        12  passed     9 passed",
        "replay       80  timed out  x",
    ]
