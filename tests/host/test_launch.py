"""The launcher: results by rank, the first failure, and no process left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_runtime import Buffer, EpConfig, member
from ep_runtime.errors import ConfigError
from ep_runtime.launch import RankFailed, launch, run_ranks
from ep_runtime.normal import NormalBuffer
from ep_runtime.world import World

SMALL = EpConfig(num_experts=4, topk=2, hidden=128, max_tokens=4)


def describe(world: World, factor: int) -> tuple[int, int, torch.Tensor, int]:
    world.barrier()
    return world.rank, world.num_ranks, torch.full((3,), world.rank * factor), os.getpid()


def fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("a bad apple")
    time.sleep(600)


def die_on_rank_1(world: World) -> str:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def sleep_long(world: World) -> None:
    time.sleep(600)


def return_what_cannot_be_pickled(world: World) -> object:
    return lambda: None


def test_results_come_by_rank_and_every_rank_is_a_process() -> None:
    results = launch(describe, 3, 10)
    assert [r[:2] for r in results] == [(0, 3), (1, 3), (2, 3)]
    assert [r[2].tolist() for r in results] == [[0] * 3, [10] * 3, [20] * 3]
    assert len({r[3] for r in results} | {os.getpid()}) == 4


@pytest.fixture
def left_behind() -> Callable[[], set[Any]]:
    """Processes that this test started and that still run (other tests keep some of their own)."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


def test_the_first_failure_ends_all_ranks(left_behind: Callable[[], set[Any]]) -> None:
    with pytest.raises(RankFailed, match="rank 1 failed with ValueError: a bad apple") as raised:
        launch(fail_on_rank_1, 3)
    assert (raised.value.rank, raised.value.kind) == (1, "ValueError")
    assert "fail_on_rank_1" in raised.value.trace
    assert not left_behind()


def test_the_line_that_failed_in_the_rank_is_shown() -> None:
    with pytest.raises(RankFailed) as raised:
        launch(fail_on_rank_1, 2)
    shown = "".join(traceback.format_exception(raised.value))
    assert "in fail_on_rank_1" in shown
    assert "rank 1: Traceback" in shown


def test_a_rank_failure_crosses_processes() -> None:
    """A job inside another job's rank, or a pool's worker, passes it on as it is."""
    failure = RankFailed(3, "ValueError", "a bad apple", "Traceback ...")
    copy = pickle.loads(pickle.dumps(failure))
    assert type(copy) is RankFailed
    assert str(copy) == str(failure)
    assert (copy.rank, copy.kind, copy.text, copy.trace) == (
        3,
        "ValueError",
        "a bad apple",
        "Traceback ...",
    )


def test_survivors_of_a_killed_rank_report_their_own_end() -> None:
    outcomes = run_ranks(die_on_rank_1, 2)
    assert outcomes[0].result == "alive"
    failure = outcomes[1].failure
    assert failure is not None
    assert (failure.kind, "SIGKILL" in failure.text) == ("exit", True)


def test_ranks_that_do_not_end_are_ended(left_behind: Callable[[], set[Any]]) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match="EP_LAUNCH_TIMEOUT_S"):
        launch(sleep_long, 2, timeout_s=3)
    assert time.monotonic() - started < 30
    assert not left_behind()


def test_a_result_that_cannot_be_sent_is_a_failure() -> None:
    with pytest.raises(RankFailed, match="rank 0 failed with"):
        launch(return_what_cannot_be_pickled, 1)


def say_something(world: World) -> None:
    logging.getLogger("ep_runtime").info("here I am")


def test_ranks_log_with_their_number_from_the_level_that_is_set(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(say_something, 1)
    assert "here I am" not in capfd.readouterr().err
    monkeypatch.setenv("EP_LOG_LEVEL", "info")
    launch(say_something, 1)
    assert "ep_runtime rank 0: INFO: here I am" in capfd.readouterr().err


def starts_a_process(world: World) -> int | None:
    child = multiprocessing.get_context("spawn").Process(target=os.getpid)
    child.start()
    child.join(60)
    return child.exitcode


def test_a_rank_may_start_processes_of_its_own() -> None:
    """As a DataLoader with workers does."""
    assert launch(starts_a_process, 1) == [0]


def closes_without_the_other(world: World) -> str:
    """Rank 0 fails inside the block, and leaves the meeting of close() out."""
    member.CLOSE_TIMEOUT_S = 1.0  # of this process, which is the rank's own
    with suppress(LookupError), NormalBuffer(world, max_tokens=4, backend="host"):
        if world.rank == 0:
            raise LookupError("a bad batch")
    with Buffer(SMALL, world, backend="host"):
        return "built again"


def test_a_group_is_built_again_after_one_rank_failed_in_it() -> None:
    outcomes = run_ranks(closes_without_the_other, 2, timeout_s=60)
    assert [one.result for one in outcomes] == ["built again"] * 2


@pytest.mark.parametrize("num_ranks", [0, -1, True, 2.0, "2", None])
def test_no_ranks_are_refused(num_ranks: Any) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        launch(describe, num_ranks, 1)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_limit_that_is_no_time_is_refused(limit: Any) -> None:
    with pytest.raises(ConfigError, match="timeout_s="):
        launch(describe, 1, 1, timeout_s=limit)


def test_what_cannot_be_sent_to_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be sent.*imported by its module's name"):
        launch(lambda world: world.rank, 2)


class Unreadable(Exception):
    """Pickles, and does not unpickle: its second argument is lost."""

    def __init__(self, what: str, *, why: str) -> None:
        super().__init__(what)
        self.why = why


def returns_what_cannot_be_read(world: World) -> object:
    return Unreadable("x", why="y") if world.rank == 0 else "fine"


def test_a_result_that_cannot_be_read_here_costs_that_rank_alone() -> None:
    first, second = run_ranks(returns_what_cannot_be_read, 2)
    assert first.failure is not None
    assert "cannot be unpickled here (TypeError" in str(first.failure)
    assert second.result == "fine"


def test_under_torchrun_nothing_starts_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="run it without torchrun"):
        run_ranks(describe, 2, 1)


PARENT = """
import os, time
from ep_runtime.launch import launch
def work(world, path):
    open(f"{path}/{os.getpid()}", "w").close()
    time.sleep(600)
if __name__ == "__main__":
    launch(work, 2, PATH)
"""


def test_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    pids.mkdir()
    script.write_text(PARENT.replace("PATH", repr(str(pids))))
    parent = subprocess.Popen([sys.executable, str(script)])
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    ranks = [int(file.name) for file in pids.iterdir()]
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_running(pid) for pid in ranks))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit_s:g} s"
        time.sleep(0.05)


# Each rank answers in a file of its own: lines of two processes on one pipe may run together.
JOB = """
import sys
from pathlib import Path
from ep_runtime.launch import launch
from ep_runtime.errors import ConfigError
def work(world, word):
    world.barrier()
    return (world.rank, word)
results = launch(work, 2, "hi")
try:
    launch(work, 3, "hi")
except ConfigError as error:
    assert "WORLD_SIZE=2" in str(error)
    rank = results[0][0]
    Path(sys.argv[1], f"rank{rank}").write_text(str(results))
"""


def test_under_torchrun_this_process_is_its_rank(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == f"[({rank}, 'hi')]"
