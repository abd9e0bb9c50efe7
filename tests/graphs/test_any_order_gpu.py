"""Captured graphs replayed in any order on GPUs: virtual ranks of one process, and processes."""

from __future__ import annotations

import pytest
import torch
from any_order import Driver

from ep_runtime import Buffer, EpConfig, World, virtual_ranks
from ep_runtime.config import DispatchFormat
from ep_runtime.launch import launch

BUCKETS = (4, 16, 32)
OPERATIONS = 2000


def config(dispatch_format: DispatchFormat) -> EpConfig:
    return EpConfig(
        num_experts=16, topk=4, hidden=256, max_tokens=32, dispatch_format=dispatch_format
    )


def walk_virtual(num_ranks: int, dispatch_format: DispatchFormat, devices: list[int]) -> None:
    buffers = virtual_ranks(config(dispatch_format), num_ranks, "cuda", devices)
    mixed = [(4, 32) * (num_ranks // 2), (16, 4) * (num_ranks // 2)]
    driver = Driver(buffers, BUCKETS, seed=num_ranks, mixed=mixed)
    assert driver.run(OPERATIONS) >= OPERATIONS
    driver.require_all_right()
    assert sum(driver.replays()) >= OPERATIONS // 5
    for buffer in buffers:
        buffer.close()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "dispatch_format"), [(2, "fp8"), (4, "bf16"), (8, "fp8")])
def test_virtual_ranks_on_one_gpu(num_ranks: int, dispatch_format: DispatchFormat) -> None:
    walk_virtual(num_ranks, dispatch_format, [0])


@pytest.mark.multi
@pytest.mark.slow
def test_virtual_ranks_on_two_gpus() -> None:
    walk_virtual(4, "fp8", [0, 1])


def walk(world: World, dispatch_format: DispatchFormat) -> list[int]:
    with Buffer(config(dispatch_format), world, backend="cuda") as buffer:
        driver = Driver([buffer], BUCKETS, seed=7)
        assert driver.run(OPERATIONS) >= OPERATIONS
        torch.cuda.synchronize()
        driver.require_all_right()
        return driver.replays()


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("dispatch_format", ["bf16", "fp8"])
def test_processes_that_choose_graphs_and_buckets_on_their_own(
    dispatch_format: DispatchFormat,
) -> None:
    replays = launch(walk, 2, dispatch_format, gpu_per_rank=True, timeout_s=110)
    assert min(sum(mine) for mine in replays) >= OPERATIONS // 5
    assert replays[0] != replays[1]  # the same operations, made in different ways
