"""CPU ranks as processes: they agree or all refuse, share memory privately, and outlive a death."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from groups import ProcessGroup, ProcessPool
from support import check_combined, check_received, new_rng, random_inputs, random_outputs
from torch.distributed import TCPStore

from ep_runtime import _C, ConfigError, EpConfig, PeerTimeout, reference

CONFIG = EpConfig(num_experts=12, topk=4, hidden=256, max_tokens=16)
BUDGET_S = 1.0
SHM = Path("/dev/shm")


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    started = ProcessPool(3, "host")
    yield started
    started.stop()


def segments() -> set[str]:
    return {path.name for path in SHM.glob("ep_runtime*")}


def good_pair(group: ProcessGroup, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, CONFIG, group.num_ranks)
    expected = reference.dispatch(CONFIG, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs), CONFIG, inputs, outputs)


def test_different_configurations_are_refused_on_every_rank(pool: ProcessPool) -> None:
    odd = replace(CONFIG, max_tokens=8, dispatch_format="bf16")
    answers = pool.ask([("open", CONFIG), ("open", odd), ("open", CONFIG)])
    for answer in answers:
        assert isinstance(answer, ConfigError), answer
        assert "rank 1 has dispatch_format='bf16' (not 'fp8')" in str(answer)
        assert "max_tokens=8 (not 16)" in str(answer)
        assert "ranks [0, 2] agree" in str(answer)
    group = ProcessGroup(CONFIG, pool)  # the processes are none the worse
    good_pair(group, new_rng())
    group.close()


def test_configuration_that_no_rank_can_use_is_refused_on_every_rank(pool: ProcessPool) -> None:
    answers = pool.ask([("open", replace(CONFIG, num_experts=10))] * 3)
    for answer in answers:
        assert isinstance(answer, ConfigError), answer
        assert "num_experts=10 over num_ranks=3" in str(answer)


def test_rank_that_never_joins_is_named() -> None:
    impatient = ProcessPool(3, "host", meet_s=1.0)
    try:
        answers = impatient.ask([("open", CONFIG), None, ("open", CONFIG)])
        for answer in (answers[0], answers[2]):
            assert isinstance(answer, PeerTimeout), answer
            assert answer.peer == 1
    finally:
        impatient.stop()


def test_shared_memory_is_gone_as_soon_as_all_have_it(pool: ProcessPool) -> None:
    before = segments()
    group = ProcessGroup(CONFIG, pool)
    assert segments() == before
    good_pair(group, new_rng())
    group.close()
    assert segments() == before


def test_shared_memory_is_private_to_the_user() -> None:
    name = f"/ep_runtime.test.{os.getpid()}"
    segment = _C.ShmSegment(name, 4096, True)
    try:
        mode = (SHM / name[1:]).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        with pytest.raises(FileExistsError):
            _C.ShmSegment(name, 4096, True)
    finally:
        segment.unlink()
        segment.close()
    assert not (SHM / name[1:]).exists()


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_is_named_and_nobody_hangs(pool: ProcessPool, victim: int) -> None:
    before = segments()
    group = ProcessGroup(CONFIG, pool)
    rng = new_rng()
    good_pair(group, rng)
    group.all("query", "set_time_budget", BUDGET_S)
    inputs = random_inputs(rng, CONFIG, 3)
    there = [rank for rank in range(3) if rank != victim]

    def only_there(arguments: list[tuple[object, ...]]) -> list[tuple[object, ...] | None]:
        return [given if rank in there else None for rank, given in enumerate(arguments)]

    process = pool.processes[victim]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    group.outcomes("dispatch", only_there([(one, 0) for one in inputs]))
    outcomes = group.outcomes("receive", only_there([(0,)] * 3))
    assert time.monotonic() - started < BUDGET_S + 4
    for rank in there:
        assert isinstance(outcomes[rank], PeerTimeout), outcomes[rank]
        assert outcomes[rank].peer == victim

    # reset() meets the ranks: it says who is missing instead of hanging.
    closed = pool.ask([("close",) if rank in there else None for rank in range(3)])
    assert closed == [None] * 3
    assert segments() == before


def test_rank_killed_while_the_others_wait_for_it(pool: ProcessPool) -> None:
    group = ProcessGroup(CONFIG, pool)
    group.all("query", "set_time_budget", BUDGET_S)
    inputs = random_inputs(new_rng(), CONFIG, 3)
    group.outcomes("dispatch", [(inputs[0], 0), None, (inputs[2], 0)])
    killer = pool.processes[1]
    started = time.monotonic()
    for rank in (0, 2):
        pool.send(rank, ("call", "receive", (0,)))
    time.sleep(0.2)
    assert killer.pid is not None
    os.kill(killer.pid, signal.SIGKILL)
    for rank in (0, 2):
        answer = pool.answer(rank)
        assert isinstance(answer, PeerTimeout)
        assert answer.peer == 1
    assert time.monotonic() - started < BUDGET_S + 4


def test_two_buffers_of_one_process_do_not_meet(pool: ProcessPool) -> None:
    first = ProcessGroup(CONFIG, pool)
    rng = new_rng()
    good_pair(first, rng)
    second = ProcessGroup(CONFIG, pool)  # the drivers keep the first one open
    good_pair(second, rng)
    second.close()


def test_torchrun_variables_make_a_group() -> None:
    """Three processes started as torchrun starts them."""
    code = (
        "import torch; from ep_runtime import *; w = World.from_env();"
        " c = EpConfig(num_experts=6, topk=2, hidden=128, max_tokens=4, dispatch_format='bf16');"
        " b = Buffer(c, w, 'host'); x = torch.full((4, 128), w.rank + 1.0).bfloat16();"
        " r = b.dispatch(x, torch.tensor([[0, 5]] * 4), torch.ones(4, 2)).wait();"
        " out = b.combine(r.x, r.handle).wait(); print(int(out[0, 0])); b.close()"
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ,
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    answers = [process.communicate(timeout=60)[0].strip() for process in ranks]
    assert answers == ["2", "4", "6"]
