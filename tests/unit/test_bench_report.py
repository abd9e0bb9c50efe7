"""Tables, file names and the plot."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from bench_records import CASE, MACHINE, timed
from rich.console import Console

from ep_runtime.bench import report
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.records import Record, read_records
from ep_runtime.errors import ConfigError

RECORDS = [
    timed(
        12.34, floor_us=3.0, wire_bytes=1_234_000, link_gbs=200.0, heap_bytes=6_000_000, error=3e-3
    ),
    timed(5.0, "dispatch"),
    timed(6.0, "combine"),
    timed(2.0, "dispatch_send"),
    timed(40.0, more={"num_tokens": 128}, floor_us=7.5),
    timed(15.0, more={"impl": "nccl-ag-rs", "recv_format": "rank-major", "mode": ""}),
    Record.without_time(CASE, MACHINE, "parts", "failed", "rank 1 gave up"),
]


def text_of(records: list[Record], options: LowLatencyOptions | None = None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=report.FILE_WIDTH)
    report.publish(records, options or LowLatencyOptions(out=None), console)
    return out.getvalue()


def cells(text: str, start: str) -> list[str]:
    """The words of the first line that contains `start`, from there on."""
    line = next(line for line in text.splitlines() if start in line)
    return line[line.index(start) + len(start) :].split()


def test_a_row_has_pair_spread_parts_and_how_near_the_floor_it_is() -> None:
    row = cells(text_of(RECORDS), "ep_runtime batched fused")
    assert row == ["12.3", "11.8-13.3", "5.0", "6.0", "3.0", "24%", "50%", "6.0", "3e-03"]


def test_numbers_that_are_not_there_are_dashes() -> None:
    assert cells(text_of(RECORDS), "nccl-ag-rs rank-major")[2:] == ["-"] * 7


def test_the_last_table_has_implementations_as_rows_and_sizes_as_columns() -> None:
    headline = text_of(RECORDS).split("Pair, us: E=8, fp8 dispatch")[1]
    assert cells(headline, "implementation") == ["T=8", "T=128"]
    assert cells(headline, "ep_runtime batched fused") == ["12.3", "40.0"]
    assert cells(headline, "nccl-ag-rs rank-major") == ["15.0", "-"]
    assert cells(headline, "bytes at link speed") == ["3.0", "7.5"]


def test_launches_are_listed_apart() -> None:
    assert "dispatch_send 2.0" in text_of(RECORDS)


def test_every_reason_for_a_missing_time_is_printed() -> None:
    absent = Record.without_time(CASE, MACHINE, "pair", "absent", "[deep_ep] not importable")
    text = text_of([*RECORDS, absent])
    assert "parts: failed: rank 1 gave up" in text
    assert "absent: [deep_ep] not importable" in text  # brackets are no markup


def test_wrong_is_printed_where_the_time_would_be() -> None:
    wrong = Record.without_time(CASE, MACHINE, "pair", "wrong", "off by 0.3", 0.3)
    assert cells(text_of([wrong]), "ep_runtime batched fused")[0] == "wrong"


def test_nothing_measured_is_no_error() -> None:
    assert "nothing was measured" in text_of([])


@pytest.mark.parametrize(
    ("skew", "label", "name"),
    [
        ("uniform", "", "low-latency-gpu-r2.json"),
        ("zipf", "", "low-latency-gpu-r2-zipf.json"),
        ("uniform", "Large T", "low-latency-gpu-r2-large-t.json"),
        ("zipf", "x", "low-latency-gpu-r2-zipf-x.json"),
    ],
)
def test_results_are_named_after_device_ranks_skew_and_label(
    skew: str, label: str, name: str, tmp_path: Path
) -> None:
    records = [timed(1.0, more={"skew": skew})]
    assert report.result_path(tmp_path, records, label) == tmp_path / name


def test_a_label_that_leaves_nothing_does_not_name_the_file_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label="):
        report.result_path(tmp_path, RECORDS, "\u00e9")


def test_publishing_writes_json_and_plot(tmp_path: Path) -> None:
    text = text_of(RECORDS, LowLatencyOptions(out=tmp_path, plot=True))
    path = tmp_path / "low-latency-gpu-r2.json"
    assert read_records(path) == RECORDS
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(path) in text.replace("\n", "")


def test_a_line_of_progress_names_size_implementation_and_result() -> None:
    assert report.line(RECORDS[0]).split() == [
        "E=8", "T=8", "fp8", "ep_runtime", "batched", "fused", "pair", "12.3",
    ]  # fmt: skip
