"""The benchmark of the normal operations on CPU ranks: checks first, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ep_runtime.bench import normal, normal_problem
from ep_runtime.bench.__main__ import main
from ep_runtime.bench.arguments import parse_normal
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.bench.routing import Sizes
from ep_runtime.errors import ConfigError

SMALL = ["--backend", "host", "--tokens", "24", "--hidden", "256", "--num-experts", "8"]
SMALL += ["--topk", "2", "--repeats", "2", "--replays", "2", "--sms", "0", "--commit", "abc"]


def test_records_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["normal", *SMALL, "--plot", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("normal-cpu")
    assert path.with_suffix(".png").stat().st_size > 1000
    records = json.loads(path.read_text())
    good = [record for record in records if record["status"] == "ok"]
    ours = {(r["op"], r["dispatch_format"]) for r in good if r["impl"] == "ep_runtime"}
    ops = ("dispatch", "dispatch_cached", "combine", "pair")
    assert ours == {(op, wire) for op in ops for wire in ("bf16", "fp8")}
    assert any(record["impl"] == "gloo-ag-rs" for record in good)
    assert {r["status"] for r in records if r["impl"] == "deep_ep"} == {"absent"}
    for record in good:
        assert record["min_us"] <= record["median_us"] <= record["max_us"]
        assert record["recv_gbs"] == pytest.approx(record["recv_bytes"] / record["median_us"] / 1e3)
    text = capsys.readouterr().out
    assert "GB/s received" in text
    assert "commit abc" in text


def problem(rank: int, wire: str) -> NormalProblem:
    sizes = Sizes(2, 16, 256, 2, 4, "uniform", 3)
    return NormalProblem.make(sizes, rank, wire, torch.device("cpu"))


def test_bytes_follow_the_formulas() -> None:
    one = problem(0, "fp8")
    most = int(one.counts.sum(0).max())
    assert one.recv_bytes("dispatch") == most * (256 + 8)
    assert one.recv_bytes("combine") == most * 512
    assert one.recv_bytes("pair") == most * (256 + 8 + 512)
    away = max(int(one.counts[0, 1]), int(one.counts[1, 0]))
    assert one.link_bytes("dispatch_cached") == away * (256 + 8)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_wrong_results_are_found(wire: str) -> None:
    one = problem(0, wire)
    sent = [problem(rank, wire) for rank in range(2)]
    rows = [p.rows if isinstance(p.rows, tuple) else (p.rows, None) for p in sent]
    goes = [((p.inputs.topk_idx // 2) == 0).any(1) for p in sent]
    x = torch.cat([values[there] for (values, _), there in zip(rows, goes, strict=True)])
    scales = None
    if wire == "fp8":
        scales = torch.cat([s[there] for (_, s), there in zip(rows, goes, strict=True)])  # type: ignore[index]
    assert one.wrong_rows(x, scales) == ""
    x.view(torch.uint8)[-1, 5] ^= 1
    assert "differ" in one.wrong_rows(x, scales)
    x.view(torch.uint8)[-1, 5] ^= 1
    if scales is not None:
        scales[0, 0] += 1
        assert "scales differ" in one.wrong_rows(x, scales)
    values = rows[0][0].bfloat16().float()
    right = (values * one.copies.unsqueeze(1)).bfloat16()
    assert one.wrong_sum(right) == ""
    right[2, 7] = 2 * right[2, 7] + 1
    assert "differ" in one.wrong_sum(right)


def test_a_wrong_result_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NormalProblem, out: torch.Tensor) -> str:
        return "combined rows differ from the sum"

    monkeypatch.setattr(normal_problem.NormalProblem, "wrong_sum", broken)
    monkeypatch.setattr(normal, "launch", lambda step, _, *rest, **__: [step(alone(), *rest)])
    options = parse_normal([*SMALL, "--ranks", "1", "--peers", "none", "--out", "-"])
    records = normal.run(options)
    assert {record.status for record in records} == {"wrong"}
    assert all(record.median_us is None for record in records)


def alone() -> object:
    from ep_runtime import World

    return World.single()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 200}, "hidden=200"),
        ({"formats": ("fp4",)}, "formats='fp4'"),
        ({"sms": ()}, "at least one"),
        ({"tokens": (0,)}, "tokens=0"),
        ({"peers": ("nobody",)}, "peers='nobody'"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormalOptions(**change)  # type: ignore[arg-type]
