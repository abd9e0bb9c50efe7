"""DecodeGraphs on ranks that are processes: each with its own buckets, built together."""

from __future__ import annotations

import random

import pytest
import torch
from layer import CONFIG, Layer, empty_inputs, random_step, require_right
from steps import Tensors

from ep_runtime import Buffer, World, env
from ep_runtime.graphs import DecodeGraphs
from ep_runtime.launch import run_ranks


def one_rank(world: World, counts: list[int], warmups: list[int]) -> list[int]:
    """A process of a group: plain dicts and numbers instead of lists."""
    torch.set_num_threads(1)
    with Buffer(CONFIG, world, backend="host") as buffer:
        layer = Layer([buffer])

        def step(inputs: Tensors, num_tokens: torch.Tensor) -> Tensors:
            return layer([inputs], [num_tokens])[0]

        graphs = DecodeGraphs(buffer, step, empty_inputs, (2, 8), warmup=warmups[world.rank])
        random.seed(5)
        for _ in range(4):
            inputs, wanted = random_step(tuple(counts))
            mine = graphs.replay(inputs[world.rank], counts[world.rank])
            require_right([mine], [wanted[world.rank]])
        return [report.replays for report in graphs.report()]


@pytest.mark.slow
def test_processes_replay_each_its_own_bucket() -> None:
    outcomes = run_ranks(one_rank, 3, [1, 7, 0], [1, 1, 1], timeout_s=60)
    assert [outcome.failure for outcome in outcomes] == [None, None, None]
    assert [outcome.result for outcome in outcomes] == [[4, 0], [0, 4], [4, 0]]


@pytest.mark.slow
def test_ranks_that_would_warm_up_unequally_all_refuse() -> None:
    outcomes = run_ranks(one_rank, 2, [1, 1], [1, 2], timeout_s=60)
    for outcome in outcomes:
        assert outcome.failure is not None
        assert outcome.failure.kind == "CaptureError"
        assert "give every rank as many buckets" in str(outcome.failure)


def breaks_in_warm_up(world: World) -> None:
    def step(inputs: Tensors, num_tokens: torch.Tensor) -> Tensors:
        if world.rank == 1:
            raise LookupError("no such layer")
        return layer([inputs], [num_tokens])[0]

    with (
        env.defaults({"EP_WARMUP_TIMEOUT_S": "1"}),
        Buffer(CONFIG, world, backend="host") as buffer,
    ):
        layer = Layer([buffer])
        DecodeGraphs(buffer, step, empty_inputs, (2, 8))


@pytest.mark.slow
def test_what_a_step_raises_in_its_warm_up_is_told_to_all() -> None:
    waits, breaks = run_ranks(breaks_in_warm_up, 2, timeout_s=60)
    assert breaks.failure is not None
    assert breaks.failure.kind == "LookupError"
    assert waits.failure is not None
    assert waits.failure.kind == "GroupFault"
    assert "rank 1 failed at warming up: LookupError: no such layer" in str(waits.failure)
