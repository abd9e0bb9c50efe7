"""Ranks that share a GPU: where they go, the daemon they get, and what is said of the results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bench_records import timed
from gpus import OWN_PROCESS

from ep_runtime.bench import report
from ep_runtime.bench.options import PEERS, LowLatencyOptions
from ep_runtime.bench.peers.find import find_peers
from ep_runtime.bench.records import read_records
from ep_runtime.bench.session import Session
from ep_runtime.bench.sharing import CONTROL, Plan, count_sharing, gpus_for, plan_ranks
from ep_runtime.env import Env
from ep_runtime.errors import BuildError, ConfigError

TORCHRUN = Env(rank=0, world_size=4, master_addr="localhost", master_port=1)


@pytest.mark.parametrize(
    ("options", "settings", "cuda", "num_gpus", "plan"),
    [
        ({}, Env(), False, 0, Plan(2)),
        ({"ranks": 3}, Env(), False, 0, Plan(3)),
        ({}, Env(), True, 4, Plan(4)),
        ({"ranks": 2}, Env(), True, 4, Plan(2)),
        ({}, Env(), True, 1, Plan(2, 2)),
        ({"ranks": 1}, Env(), True, 1, Plan(1)),
        ({"ranks": 8}, Env(), True, 2, Plan(8, 4)),
        ({"ranks": 3}, Env(), True, 2, Plan(3, 2)),
        ({"share_gpu": True}, Env(), True, 2, Plan(2, 2, one_gpu=True)),
        ({"share_gpu": True, "ranks": 4}, Env(), True, 2, Plan(4, 4, one_gpu=True)),
        ({}, TORCHRUN, True, 2, Plan(4)),  # its ranks find out by themselves
    ],
)
def test_ranks_are_placed(
    options: dict[str, Any], settings: Env, cuda: bool, num_gpus: int, plan: Plan
) -> None:
    made = LowLatencyOptions(**options)
    assert plan_ranks(made, settings, cuda=cuda, num_gpus=num_gpus) == plan


@pytest.mark.parametrize(
    ("options", "settings", "cuda", "words"),
    [
        ({"share_gpu": True}, Env(), False, "backend=host"),
        ({"share_gpu": True}, TORCHRUN, True, "without torchrun"),
        ({"ranks": 33}, Env(), True, "ranks=33 on 2 GPUs: at most 32"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    options: dict[str, Any], settings: Env, cuda: bool, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_ranks(LowLatencyOptions(**options), settings, cuda=cuda, num_gpus=2)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the daemon's control: writes down how it was called, and where."""
    log, script = tmp_path / "calls", tmp_path / CONTROL
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = -d ]; then word=start; else read word; fi\n'
        f'echo "$word $CUDA_MPS_PIPE_DIRECTORY" >> {log}\n[ ! -e {tmp_path}/broken ]\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "EP_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    return log


def test_sharing_ranks_get_a_daemon_of_their_own_and_a_share_each(control: Path) -> None:
    before = dict(os.environ)
    with gpus_for(Plan(8, 4)):
        place = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(place).is_dir()
        assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        assert os.environ["EP_MEMORY"] == "ipc"
        assert control.read_text().splitlines() == [f"start {place}"]
    assert control.read_text().splitlines() == [f"start {place}", f"quit {place}"]
    assert dict(os.environ) == before
    assert not Path(place).exists()


def test_the_daemon_ends_with_a_run_that_fails(control: Path) -> None:
    with pytest.raises(ValueError, match="a rank"), gpus_for(Plan(2, 2)):
        raise ValueError("a rank")
    assert [line.split()[0] for line in control.read_text().splitlines()] == ["start", "quit"]


def test_a_daemon_that_will_not_end_does_not_cost_the_results(
    control: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gpus_for(Plan(2, 2)):
        (control.parent / "broken").touch()
    assert "may still be there" in caplog.text


def test_a_users_daemon_and_share_are_kept(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "30")
    with gpus_for(Plan(2, 2)):
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/somewhere"
        assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
    assert not control.exists()


def test_ranks_with_a_gpu_each_get_no_daemon(control: Path) -> None:
    before = dict(os.environ)
    with gpus_for(Plan(4)):
        assert dict(os.environ) == before
    assert not control.exists()


def test_a_machine_without_mps_is_told_what_to_do(
    control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (control.parent / "broken").touch()
    with pytest.raises(BuildError, match="failed"), gpus_for(Plan(2, 2)):
        pytest.fail("started without a daemon")
    monkeypatch.setenv("PATH", str(control.parent / "nothing here"))
    with pytest.raises(BuildError, match="not on the PATH; install it"), gpus_for(Plan(2, 2)):
        pytest.fail("started without a daemon")


def test_sharing_is_counted_on_the_fullest_gpu() -> None:
    assert count_sharing(["a", "b", "a", "a"]) == 3
    assert count_sharing(["a", "b"]) == 1


def test_peers_that_need_a_gpu_per_rank_are_left_out_with_the_reason() -> None:
    session = SimpleNamespace(shares_gpus=True, ranks_per_gpu=2, options=LowLatencyOptions())
    found = find_peers(cast(Session, session))
    assert not found.peers
    assert [one.name for one in found.absent] == list(PEERS)
    assert all("2 ranks share one" in one.reason for one in found.absent)


def test_results_say_that_no_link_was_measured(tmp_path: Path) -> None:
    records = [timed(1.0, more={"ranks_per_gpu": 2})]
    assert report.result_path(tmp_path, records).name == "low-latency-gpu-r2-shared.json"
    words = "(2 ranks share a GPU: no link is measured)"
    assert words in report._heading(records)
    assert words in str(report.headlines(records)[0].title)


@pytest.mark.gpu
@pytest.mark.alone
def test_two_ranks_on_one_gpu_are_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ep_runtime.bench", "low-latency", "--share-gpu"]
    command += ["--tokens", "1,16", "--experts", "32", "--pairs", "10", "--replays", "3"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env={**os.environ, **OWN_PROCESS},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-shared.json")
    records = read_records(path)
    pairs = [r for r in records if r.op == "pair" and r.case.impl == "ep_runtime"]
    assert [r.status for r in pairs] == ["ok"] * 4
    assert {r.case.ranks_per_gpu for r in records} == {2}
    assert {(r.timing, r.floor_us) for r in pairs} == {("graph", None)}
    assert {r.case.impl for r in records if r.status == "absent"} == set(PEERS)
