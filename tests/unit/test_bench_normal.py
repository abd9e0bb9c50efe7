"""The benchmark of the normal operations on CPU ranks: checks first, and says what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_records import MACHINE

from ep_runtime.bench import normal, normal_peers, normal_problem, normal_report
from ep_runtime.bench.__main__ import main
from ep_runtime.bench.arguments import parse_normal
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_peers import Peer
from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.bench.normal_records import NormalRecord
from ep_runtime.bench.options import Skew
from ep_runtime.bench.routing import Sizes
from ep_runtime.bench.session import Session, open_session
from ep_runtime.errors import ConfigError
from ep_runtime.integrations.deep_ep import install
from ep_runtime.launch import launch
from ep_runtime.world import World

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
        ({"label": "\u00e9"}, "label="),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormalOptions(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("skew", "label", "name"),
    [
        ("uniform", "", "normal-gpu-r2.json"),
        ("zipf", "", "normal-gpu-r2-zipf.json"),
        ("zipf", "Large T", "normal-gpu-r2-zipf-large-t.json"),
    ],
)
def test_results_are_named_after_device_ranks_skew_and_label(
    skew: str, label: str, name: str, tmp_path: Path
) -> None:
    made: Any = SimpleNamespace(machine=MACHINE, num_ranks=2, ranks_per_gpu=1, skew=skew)
    assert normal_report.result_path(tmp_path, [made], label) == tmp_path / name
    with pytest.raises(ConfigError, match="label="):
        normal_report.result_path(tmp_path, [made], "\u00e9")


# ---- peers, on two ranks -------------------------------------------------------------------------

RANKS = parse_normal([*SMALL, "--ranks", "2", "--peers", "nccl-ag-rs", "--out", "-"])
BF16 = replace(RANKS, formats=("bf16",))
FAULTS = ("gather", "scatter", "check", "first run")


def breaking(fault: str) -> None:
    """Breaks the peer in this process in one way."""

    def gather(everyones: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup) -> None:
        dist.all_gather_into_tensor(everyones, mine, group=group)
        everyones[-1, -1] ^= 1

    def scatter(out: torch.Tensor, y: torch.Tensor, group: dist.ProcessGroup) -> None:
        out.copy_(y.chunk(dist.get_world_size(group))[dist.get_rank(group)])  # its own alone

    def boom() -> str:
        raise RuntimeError("peer broke")

    calls = {
        "all_gather_into_tensor": gather if fault == "gather" else dist.all_gather_into_tensor,
        "reduce_scatter_tensor": scatter if fault == "scatter" else dist.reduce_scatter_tensor,
    }
    normal_peers.dist = SimpleNamespace(**calls)  # type: ignore[assignment]

    def broken(session: Session, problem: NormalProblem) -> Peer:
        if fault in ("gather", "scatter"):
            return normal_peers.nccl_peer(session, problem)
        # Without collectives, in which the other rank would wait for the one that raises.
        here = boom if session.team.rank == 1 else str
        return Peer({"dispatch": here}, here if fault == "check" else str)

    normal.nccl_peer = broken  # type: ignore[attr-defined]


def with_faults(world: World) -> list[list[NormalRecord]]:
    """Runs one after the other in the same processes; a fault must not end them."""
    runs = [normal.measure(world, replace(RANKS, skew="half-empty"))]
    for fault in FAULTS:
        breaking(fault)
        runs.append(normal.measure(world, BF16 if fault != "first run" else RANKS))
    return runs


@pytest.fixture(scope="module")
def runs() -> dict[str, list[NormalRecord]]:
    first, second = launch(with_faults, 2)
    assert first == second, "ranks must report the same"
    peers = [[r for r in run if r.impl == "gloo-ag-rs"] for run in first]
    return dict(zip(("half-empty", *FAULTS), peers, strict=True))


def test_ranks_without_tokens_take_part_in_collectives(
    runs: dict[str, list[NormalRecord]],
) -> None:
    timed = {(r.op, r.dispatch_format) for r in runs["half-empty"] if r.status == "ok"}
    assert timed == {(op, w) for op in ("dispatch", "combine", "pair") for w in ("bf16", "fp8")}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("gather", "gathered rows differ from what rank 1 sent"), ("scatter", "the ranks' sum")],
)
def test_a_wrong_peer_has_no_time(
    runs: dict[str, list[NormalRecord]], fault: str, reason: str
) -> None:
    (record,) = runs[fault]
    assert record.status == "wrong"
    assert record.median_us is None
    assert reason in record.reason


def test_a_peer_that_raises_is_recorded_and_the_run_goes_on(
    runs: dict[str, list[NormalRecord]],
) -> None:
    (checked,) = runs["check"]
    assert (checked.status, checked.timing) == ("failed", "eager")
    assert "rank 1 failed at check: RuntimeError: peer broke" in checked.reason
    bf16, fp8 = runs["first run"]
    assert (bf16.dispatch_format, fp8.dispatch_format) == ("bf16", "fp8")
    for record in (bf16, fp8):
        assert record.status == "failed"
        assert "rank 1 failed at first run: RuntimeError: peer broke" in record.reason


def with_drop_in(world: World) -> list[tuple[str, str, dict[str, list[tuple[str, int]]]]]:
    """What DeepEP's adapter finds wrong with our drop-in, with that of which a row was changed, and
    the calls that each of its operations makes."""
    install()
    import deep_ep

    calls: list[tuple[str, int]] = []

    class Told(deep_ep.Buffer):  # type: ignore[misc, name-defined]
        spoil = False

        def get_dispatch_layout(self, *args: Any, **more: Any) -> Any:
            calls.append(("layout", 0))
            return super().get_dispatch_layout(*args, **more)

        def dispatch(self, *args: Any, **more: Any) -> Any:
            calls.append(
                ("cached" if "handle" in more else "dispatch", more.get("num_worst_tokens", 0))
            )
            found = super().dispatch(*args, **more)
            rows = found[0][0] if isinstance(found[0], tuple) else found[0]
            if Told.spoil:
                rows.view(torch.uint8)[0] ^= 1
            return found

    deep_ep.Buffer = Told
    told = []
    cases: list[tuple[Skew, str]] = [("uniform", "bf16"), ("uniform", "fp8"), ("half-empty", "fp8")]
    with open_session(world, RANKS.session()) as session:
        for skew, wire in cases:
            sizes = Sizes(2, 24, 256, 2, 8, skew, 0)
            problem = NormalProblem.make(sizes, world.rank, wire, session.device)
            peer = normal_peers.deep_ep_peer(session, problem, 24)
            right = peer.check()
            made = {}
            for op, once in peer.runs.items():
                calls.clear()
                once()
                made[op] = list(calls)
            Told.spoil = True
            told.append((right, peer.check(), made))
            Told.spoil = False
    return told


def test_deep_ep_is_checked_and_its_dispatch_includes_layout_and_counts() -> None:
    whole = [("layout", 0), ("dispatch", 48)]
    for rank in launch(with_drop_in, 2):
        for right, spoilt, made in rank:
            assert right == ""
            assert "differ" in spoilt
            assert made == {
                "dispatch": whole,
                "dispatch_cached": [("cached", 0)],
                "combine": [],
                "pair": whole,
            }
