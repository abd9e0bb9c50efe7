"""One process per GPU: both kinds of symmetric memory, graphs of a rank, deaths and closings."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpus import num_gpus
from groups import ProcessGroup, ProcessPool
from support import (
    check_combined,
    check_received,
    new_rng,
    random_counts,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import ConfigError, EpConfig, PeerTimeout, reference

pytestmark = [pytest.mark.multi, pytest.mark.alone]

CONFIG = EpConfig(num_experts=16, topk=4, hidden=512, max_tokens=24)
RANKS = num_gpus()
BUDGET_S = 1.0


def memory_kinds() -> list[str]:
    built = importlib.util.find_spec("ep_runtime._nvshmem") is not None
    return ["ipc", "nvshmem"] if built else ["ipc"]


@pytest.fixture(scope="module", params=["ipc", "nvshmem"])
def pools(request: pytest.FixtureRequest) -> Iterator[list[ProcessPool]]:
    """The processes of the tests so far, their memory chosen by EP_MEMORY; the last may be used."""
    if request.param not in memory_kinds():
        pytest.skip("ep_runtime._nvshmem was not built (nvcc or nvidia-nvshmem-cu13 is missing)")
    started = [_start(request.param)]
    yield started
    started[-1].stop()


@pytest.fixture
def pool(pools: list[ProcessPool]) -> ProcessPool:
    """New ones only after a test that broke some: starting one on every GPU takes seconds."""
    last = pools[-1]
    if not last.as_new:
        last.stop()
        pools.append(_start(last.memory))
    return pools[-1]


def _start(memory: str) -> ProcessPool:
    pool = ProcessPool(RANKS, "cuda", environment={"EP_MEMORY": memory})
    pool.memory = memory
    return pool


def good_pair(group: ProcessGroup, rng: torch.Generator, chain: int = 0) -> None:
    inputs = random_inputs(rng, CONFIG, RANKS, padded=True)
    expected = reference.dispatch(CONFIG, inputs)
    check_received(group.dispatch(inputs, chain), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs, chain), CONFIG, inputs, outputs)


def test_memory_is_what_was_asked_for(pool: ProcessPool) -> None:
    group = ProcessGroup(CONFIG, pool)
    assert group.all("query", "memory_kind") == [pool.memory] * RANKS
    assert group.all("query", "backend") == ["cuda"] * RANKS
    good_pair(group, new_rng())
    group.close()


def test_groups_come_and_go_in_the_same_processes(pool: ProcessPool) -> None:
    rng = new_rng()
    for _ in range(3):
        group = ProcessGroup(CONFIG, pool)
        for chain in (0, 1, 0):
            good_pair(group, rng, chain)
        group.close()


def test_graphs_of_each_rank_replay_with_different_buckets(pool: ProcessPool) -> None:
    """Ranks replay graphs of different sizes in one step, mixed with eager calls."""
    rng = new_rng()
    group = ProcessGroup(CONFIG, pool)
    good_pair(group, rng)
    buckets = [(24, 8)[rank % 2] for rank in range(RANKS)]
    group.each("capture", [(rows, 0) for rows in buckets])
    for _ in range(20):
        counts = [random_counts(rng, 1, rows)[0] for rows in buckets]
        inputs = [random_input(rng, CONFIG, count) for count in counts]
        expected = reference.dispatch(CONFIG, inputs)
        outputs = random_outputs(rng, expected)
        results = group.each("replay", list(zip(inputs, outputs, strict=True)))
        check_received([received for received, _ in results], expected)
        check_combined([out for _, out in results], CONFIG, inputs, outputs)
        good_pair(group, rng, int(torch.randint(2, (), generator=rng)))
    group.close()


def test_different_configurations_are_refused_on_every_rank(pool: ProcessPool) -> None:
    others = [("open", CONFIG)] * (RANKS - 1)
    answers = pool.ask([*others, ("open", replace(CONFIG, topk=5))])
    for answer in answers:
        assert isinstance(answer, ConfigError), answer
        assert "topk" in str(answer)
    group = ProcessGroup(CONFIG, pool)
    good_pair(group, new_rng())
    group.close()


@pytest.mark.parametrize("victim", [0, RANKS - 1])
def test_killed_rank_is_named_and_the_context_survives(pool: ProcessPool, victim: int) -> None:
    rng = new_rng()
    group = ProcessGroup(CONFIG, pool)
    good_pair(group, rng)
    group.all("query", "set_time_budget", BUDGET_S)
    process = pool.processes[victim]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    def survivors(method: str, arguments: list[tuple[object, ...]]) -> list[object]:
        given = [None if rank == victim else arguments[rank] for rank in range(RANKS)]
        outcomes = group.outcomes(method, given)
        return outcomes[:victim] + outcomes[victim + 1 :]

    others = RANKS - 1
    started = time.monotonic()
    work: list[tuple[object, ...]] = [(random_input(rng, CONFIG, 8), 0) for _ in range(RANKS)]
    assert survivors("dispatch", work) == [None] * others
    outcomes = survivors("receive_alone", [(0,)] * RANKS)
    assert time.monotonic() - started < BUDGET_S + 5
    for outcome in outcomes:
        assert isinstance(outcome, PeerTimeout), outcome
        assert outcome.peer == victim
    assert survivors("use_gpu", [()] * RANKS) == [100.0] * others
