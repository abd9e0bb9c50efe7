"""Recorded steps replayed in any order on CPU ranks: of one process, and of several."""

from __future__ import annotations

import pytest
import torch
from any_order import Driver

from ep_runtime import Buffer, EpConfig, World, virtual_ranks
from ep_runtime.config import DispatchFormat
from ep_runtime.launch import launch

BUCKETS = (2, 8, 24)


def config(dispatch_format: DispatchFormat) -> EpConfig:
    return EpConfig(
        num_experts=8, topk=3, hidden=128, max_tokens=24, dispatch_format=dispatch_format
    )


@pytest.mark.parametrize(
    ("num_ranks", "dispatch_format", "seed"),
    [(1, "bf16", 1), (2, "fp8", 2), (4, "bf16", 3), (8, "fp8", 4)],
)
def test_virtual_ranks(num_ranks: int, dispatch_format: DispatchFormat, seed: int) -> None:
    buffers = virtual_ranks(config(dispatch_format), num_ranks, backend="host")
    mixed = [(2, *(24,) * (num_ranks - 1)), ((8, 2, 24, 8) * 2)[:num_ranks]]
    driver = Driver(buffers, BUCKETS, seed, mixed)
    assert driver.run(500) >= 500
    driver.require_all_right()
    assert sum(driver.replays()) >= 100
    for buffer in buffers:
        buffer.close()


def walk(world: World, seed: int) -> list[int]:
    torch.set_num_threads(1)
    with Buffer(config("fp8"), world, backend="host") as buffer:
        driver = Driver([buffer], BUCKETS, seed)
        driver.run(500)
        driver.require_all_right()
        return driver.replays()


@pytest.mark.slow
def test_processes_that_choose_graphs_and_buckets_on_their_own() -> None:
    replays = launch(walk, 2, 4, timeout_s=100)
    assert min(sum(mine) for mine in replays) >= 100
    assert replays[0] != replays[1]  # the same operations, made in different ways
