"""Two result files side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_records import CASE, MACHINE, timed

from ep_runtime.bench.__main__ import main
from ep_runtime.bench.compare import changes
from ep_runtime.bench.records import Record, write_records


def test_cases_are_matched_by_size_and_operation() -> None:
    old = [timed(10.0), timed(4.0, "dispatch"), timed(40.0, more={"num_tokens": 128})]
    new = [timed(30.0, more={"num_tokens": 128}), timed(11.0), timed(3.0, more={"topk": 1})]
    found = [(c.case.num_tokens, c.op, c.old_us, c.new_us) for c in changes(old, new)]
    assert found == [(128, "pair", 40.0, 30.0), (8, "pair", 10.0, 11.0)]


@pytest.mark.parametrize(("new_us", "clear"), [(11.4, False), (11.6, True), (8.4, True)])
def test_a_change_is_clear_when_the_ranges_do_not_overlap(new_us: float, clear: bool) -> None:
    # 10.0 spans 9.5 to 11; the others half below and one above as well
    (change,) = changes([timed(10.0)], [timed(new_us)])
    assert change.clear is clear
    assert change.percent == pytest.approx(10 * new_us - 100)


def test_wrong_results_are_not_compared() -> None:
    wrong = Record.without_time(CASE, MACHINE, "pair", "wrong", "off")
    assert changes([wrong], [timed(1.0)]) == changes([timed(1.0)], [wrong]) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timing": "eager"}, "timing graph -> eager"),
        ({"machine": replace(MACHINE, device="GPU 2")}, "device GPU -> GPU 2"),
        ({"machine": replace(MACHINE, backend="host")}, "backend cuda -> host"),
    ],
)
def test_times_taken_otherwise_are_not_compared(
    change: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [timed(10.0), timed(4.0, "dispatch")]
    other = [replace(both[0], **change), both[1]]
    assert [found.op for found in changes(both, other)] == ["dispatch"]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_records(old, both)
    write_records(new, other)
    assert main(["compare", str(old), str(new)]) == 0
    assert f"1 in both, but not comparable: {told}\n" in capsys.readouterr().out
    write_records(new, other[:1])
    assert main(["compare", str(old), str(new)]) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("old_us", [0.0, -0.5])
def test_a_time_that_is_not_above_zero_has_no_percentage(
    old_us: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (change,) = changes([timed(old_us)], [timed(3.0)])
    assert change.percent is None
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_records(old, [timed(old_us)])
    write_records(new, [timed(3.0)])
    assert main(["compare", str(old), str(new)]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split()[-3:] == [f"{old_us:.2f}", "3.00", "-"]


def test_the_command_prints_a_row_per_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_records(old, [timed(10.0)])
    write_records(new, [timed(5.0)])
    assert main(["compare", str(old), str(new)]) == 0
    assert "-50.0%" in capsys.readouterr().out
    write_records(new, [timed(5.0, "combine")])
    assert main(["compare", str(old), str(new)]) == 1
