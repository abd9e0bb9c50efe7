"""Captured graphs replayed in any order on GPUs: virtual ranks of one process, and processes."""

from __future__ import annotations

import pytest
import torch
from any_order import Driver
from gpus import OWN_PROCESS, num_gpus
from mps import daemon, share_of

from ep_runtime import Buffer, EpConfig, World, virtual_ranks
from ep_runtime.config import DispatchFormat
from ep_runtime.launch import launch

# Up to 60 s where many tests run at a time, and half as long before, for torch to load its kernels.
pytestmark = pytest.mark.timeout(240)

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
@pytest.mark.alone
@pytest.mark.slow
def test_virtual_ranks_on_every_gpu() -> None:
    """A rank on each of many GPUs, two on each of two."""
    gpus = num_gpus()
    walk_virtual(max(4, gpus), "fp8", list(range(gpus)))


def walk(world: World, dispatch_format: DispatchFormat) -> list[int]:
    torch.set_num_threads(1)
    with Buffer(config(dispatch_format), world, backend="cuda") as buffer:
        driver = Driver([buffer], BUCKETS, seed=7)
        assert driver.run(OPERATIONS) >= OPERATIONS
        torch.cuda.synchronize()
        driver.require_all_right()
        return driver.replays()


@pytest.mark.multi
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("dispatch_format", ["bf16", "fp8"])
def test_processes_that_choose_graphs_and_buckets_on_their_own(
    dispatch_format: DispatchFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OWN_PROCESS.items():
        monkeypatch.setenv(name, value)
    require_own_ways(launch(walk, num_gpus(), dispatch_format, gpu_per_rank=True, timeout_s=110))


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="every process has a GPU here, above")
def test_processes_that_share_the_gpu(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon(tmp_path_factory.mktemp("mps")) as found:
        for name, value in {**found, **OWN_PROCESS, **share_of(2), "EP_MEMORY": "ipc"}.items():
            monkeypatch.setenv(name, value)
        require_own_ways(launch(walk, 2, "fp8", gpu_per_rank=True, timeout_s=110))


def require_own_ways(replays: list[list[int]]) -> None:
    """All ranks made the same operations, each as it chose."""
    assert min(sum(mine) for mine in replays) >= OPERATIONS // 5
    assert len({tuple(mine) for mine in replays}) == len(replays)
