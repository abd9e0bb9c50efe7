"""The whole benchmark on two CPU ranks: every format, the collective peers, and failures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ep_runtime.bench import candidates, low_latency, measure, ours
from ep_runtime.bench.candidates import Candidate
from ep_runtime.bench.implementation import Implementation, Problem
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.ours import OurBuffer
from ep_runtime.bench.records import Record, read_records
from ep_runtime.bench.session import Session
from ep_runtime.launch import launch
from ep_runtime.world import World

OPTIONS = LowLatencyOptions(
    tokens=(1, 5),
    hidden=256,
    topk=3,
    experts=(8,),
    ranks=2,
    dispatch_formats=("fp8", "bf16"),
    recv_formats=("batched", "compact", "contiguous"),
    modes=("split",),
    pairs=3,
    replays=2,
    input_sets=2,
    backend="host",
    max_tokens=6,
    out=None,
    commit="abc",
    command="bench",
    link_gbs=100.0,
)


def several(world: World, options: list[LowLatencyOptions]) -> list[list[Record]]:
    """Runs one after the other in the same processes."""
    return [low_latency.measure(world, one) for one in options]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results")
    options = [
        replace(OPTIONS, out=out, peers=("auto",)),
        replace(OPTIONS, skew="half-empty", tokens=(4,), dispatch_formats=("fp8",)),
        replace(OPTIONS, skew="one-rank", tokens=(4,), dispatch_formats=("fp8",)),
        replace(
            OPTIONS,
            tokens=(4,),
            dispatch_formats=("bf16",),
            combine_formats=("bf16", "fp8"),
            peers=("none",),
        ),
    ]
    first, second = launch(several, 2, options)
    assert first == second, "ranks must report the same"
    names = ("uniform", "half-empty", "one-rank", "combine-formats")
    return {**dict(zip(names, first, strict=True)), "out": out}


def pairs(records: list[Record]) -> dict[tuple[str, str, str, int], Record]:
    return {
        (r.case.impl, r.case.recv_format, r.case.dispatch_format, r.case.num_tokens): r
        for r in records
        if r.op == "pair"
    }


def test_every_variant_of_ours_is_right_and_timed(runs: dict[str, Any]) -> None:
    found = pairs(runs["uniform"])
    for recv in OPTIONS.recv_formats:
        for wire in OPTIONS.dispatch_formats:
            for tokens in OPTIONS.tokens:
                record = found["ep_runtime", recv, wire, tokens]
                assert record.status == "ok", record.reason
                assert record.timing == "eager"
                assert record.error is not None
                assert 0 < record.error < 1e-2
                assert 0 < record.min_us <= record.median_us <= record.max_us  # type: ignore[operator]


@pytest.mark.parametrize("impl", ["gloo-ag-rs", "gloo-a2a", "gloo-a2a-equal"])
@pytest.mark.parametrize("skew", ["uniform", "half-empty", "one-rank"])
def test_collective_peers_are_right(runs: dict[str, Any], impl: str, skew: str) -> None:
    records = [r for r in runs[skew] if r.case.impl == impl and r.op == "pair"]
    assert records
    assert [(r.status, r.reason) for r in records] == [("ok", "")] * len(records)


@pytest.mark.parametrize("skew", ["half-empty", "one-rank"])
def test_skewed_routing_is_right(runs: dict[str, Any], skew: str) -> None:
    ours = [r for r in runs[skew] if r.case.impl == "ep_runtime" and r.op == "pair"]
    assert [r.status for r in ours] == ["ok"] * 3
    assert {r.case.skew for r in ours} == {skew}


def test_operations_and_launches_are_timed_apart(runs: dict[str, Any]) -> None:
    case = pairs(runs["uniform"])["ep_runtime", "batched", "fp8", 5].case
    ops = {r.op for r in runs["uniform"] if r.case == case}
    parts = {f"{op}_{part}" for op in ("dispatch", "combine") for part in ("send", "recv")}
    assert ops == {"pair", "dispatch", "combine"} | parts


def test_peers_that_cannot_run_here_are_named_with_a_reason(runs: dict[str, Any]) -> None:
    absent = {r.case.impl: r.reason for r in runs["uniform"] if r.status == "absent"}
    assert {"gloo-ag-rs-symm", "gloo-ag-rs+kernels", "flashinfer", "deep_ep"} <= set(absent)
    assert all(absent.values())


def test_bytes_and_floor_follow_the_formula(runs: dict[str, Any]) -> None:
    record = pairs(runs["uniform"])["ep_runtime", "compact", "bf16", 5]
    assert record.link_bytes is not None
    assert record.wire_bytes is not None
    # dispatch and combine rows are alike in bf16, and at most every token crosses
    assert 0 < record.link_bytes <= 5 * 2 * 512
    assert record.link_bytes < record.wire_bytes
    assert record.floor_us == pytest.approx(record.link_bytes / 100e3)


def test_fp8_combines_stand_beside_bf16_ones(runs: dict[str, Any]) -> None:
    pairs = [r for r in runs["combine-formats"] if r.op == "combine"]
    wide = [r for r in pairs if r.case.impl == "ep_runtime"]
    short = [r for r in pairs if r.case.impl == "ep_runtime-fp8-combine"]
    assert len(wide) == len(short) == len(OPTIONS.recv_formats)
    for one, other in zip(wide, short, strict=True):
        assert one.status == other.status == "ok"
        assert other.link_bytes == one.link_bytes * (256 + 8) / 512
        assert one.error < 1e-2 < other.error < 6e-2


def test_everything_to_one_rank_loads_the_link_with_all_tokens(runs: dict[str, Any]) -> None:
    record = pairs(runs["one-rank"])["ep_runtime", "batched", "fp8", 4]
    assert record.link_bytes == 4 * (256 + 8 + 512)


def test_results_are_on_disk_when_the_run_is_over(runs: dict[str, Any]) -> None:
    (path,) = Path(runs["out"]).iterdir()
    assert path.name.startswith("low-latency-cpu")
    assert read_records(path) == runs["uniform"]


class Broken(OurBuffer):
    """On rank 1 alone: an exception while building, while running, or a wrong result."""

    fault = ""

    def apply_experts(self, index: int) -> None:
        super().apply_experts(index)
        if self._problem.rank == 1:
            if self.fault == "raise":
                raise ValueError("no such expert")
            if self.fault == "wrong":
                self._y.neg_()


def broken(fault: str, build: Any, problem: Problem) -> Implementation:
    made = build(problem)
    assert isinstance(made, OurBuffer)
    if fault == "build" and problem.rank == 1:
        raise MemoryError("too large")
    made.__class__ = Broken
    made.fault = fault  # type: ignore[attr-defined]
    return made


def with_faults(world: World, options: LowLatencyOptions) -> list[list[Record]]:
    """Each fault once, and after each a sound run on the same ranks."""
    ours.TIME_BUDGET_S = 1.0  # what rank 0 waits for rank 1, which has raised
    results = []
    with low_latency.open_session(world, options) as session:
        problem = low_latency._problem(session, 8, "fp8", 5)
        for fault in ("build", "raise", "wrong"):
            for candidate in spoilt(session, fault):
                results.append(measure.measure_case(session, candidate, problem))
    return results


def spoilt(session: Session, fault: str) -> list[Candidate]:
    buffers = candidates.Buffers(session.store, session.team.rank, 2, session.device)
    (sound,) = candidates.our_candidates(session, buffers)
    return [replace(sound, build=partial(broken, fault, sound.build)), sound]


@pytest.fixture(scope="module")
def faults() -> list[list[Record]]:
    options = replace(OPTIONS, recv_formats=("batched",), parts=False, peers=("none",))
    first, second = launch(with_faults, 2, options)
    assert first == second
    return first


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (0, "failed", "rank 1 failed at build: MemoryError: too large"),
        (2, "failed", "rank 1 failed at check: ValueError: no such expert"),
        (4, "wrong", "rank 0: eager, input set 0: combine is off"),
    ],
)
def test_a_fault_on_one_rank_costs_its_case_and_no_more(
    faults: list[list[Record]], run: int, status: str, reason: str
) -> None:
    (record,) = faults[run]
    assert (record.status, record.median_us) == (status, None)
    assert reason in record.reason
    assert [one.status for one in faults[run + 1]] == ["ok"]


def test_wrong_results_make_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, faults: list[list[Record]]
) -> None:
    for run, status in ((4, 1), (5, 0)):
        monkeypatch.setattr(low_latency, "run", lambda _options, run=run: faults[run])
        assert low_latency.main(OPTIONS) == status
