"""Records: what they may say, and that JSON keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_records import CASE, MACHINE, timed

from ep_runtime.bench.records import Record, read_records, write_records
from ep_runtime.errors import ConfigError

REQUIRED = {
    *("impl", "op", "num_ranks", "num_tokens", "hidden", "topk", "num_experts"),
    *("dispatch_format", "recv_format", "num_sms"),
    *("median_us", "min_us", "max_us", "device", "commit"),
}


def test_json_is_a_list_of_flat_objects_with_the_required_fields(tmp_path: Path) -> None:
    path = tmp_path / "results" / "low-latency-x.json"
    write_records(path, [timed(5.0)])
    (values,) = json.loads(path.read_text())
    assert set(values) >= REQUIRED
    assert not any(isinstance(value, dict | list) for value in values.values())
    assert (values["impl"], values["median_us"], values["device"]) == ("ep_runtime", 5.0, "GPU")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [
        timed(5.0, link_bytes=10.0, floor_us=0.5, error=1e-3),
        Record.without_time(CASE, MACHINE, "pair", "wrong", "row 3 differs", 0.5),
        Record.without_time(replace(CASE, impl="deep_ep"), MACHINE, "pair", "absent", "not here"),
    ]
    path = tmp_path / "records.json"
    write_records(path, records)
    assert read_records(path) == records
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


@pytest.mark.parametrize("change", [{"extra": 1}, {"median_us": None, "drop": "impl"}])
def test_a_file_of_another_version_is_refused(change: dict[str, object]) -> None:
    values = {**timed(5.0).to_json(), **change}
    values.pop(str(values.pop("drop", "")), None)
    with pytest.raises(ConfigError, match=r"extra|impl"):
        Record.from_json(values)


@pytest.mark.parametrize("content", [None, "[", "[3]", '{"a": 1}'])
def test_a_file_without_records_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"results.json holds no records .*; give a JSON file"):
        read_records(path)


def test_a_wrong_result_cannot_carry_a_time() -> None:
    with pytest.raises(ConfigError, match="exactly when it is ok"):
        Record(case=CASE, machine=MACHINE, op="pair", status="wrong", reason="off", median_us=3.0)


def test_an_ok_record_must_have_a_time() -> None:
    with pytest.raises(ConfigError, match="median_us=None"):
        Record(case=CASE, machine=MACHINE, op="pair")


def test_a_missing_time_must_be_explained() -> None:
    with pytest.raises(ConfigError, match="without a reason"):
        Record.without_time(CASE, MACHINE, "pair", "failed", "")
