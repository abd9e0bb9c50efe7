"""Choosing a backend, and telling which ranks brought something else."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from ep_runtime import _C, BuildError, ConfigError, EpConfig, World, virtual_ranks
from ep_runtime.buffer import Buffer
from ep_runtime.connect import _raise_differences, choose_device
from ep_runtime.launch import run_ranks
from ep_runtime.normal import NormalBuffer, virtual_normal_ranks

CONFIG = EpConfig(num_experts=4, topk=2, hidden=128, max_tokens=4)


def builds_with_a_wrong_variable(world: World) -> list[tuple[str, float]]:
    if world.rank == 1:
        os.environ["EP_MEMORY"] = "banana"
    told = []
    for build in (
        lambda: Buffer(CONFIG, world, "host"),
        lambda: NormalBuffer(world, max_tokens=16, backend="host"),
    ):
        started = time.monotonic()
        with pytest.raises(Exception, match="EP_MEMORY") as error:
            build()
        told.append((repr(error.value), time.monotonic() - started))
    return told


def test_host_is_always_there() -> None:
    assert choose_device("host", None) == torch.device("cpu")


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    usable = torch.cuda.is_available() and _C.has_cuda
    assert choose_device("auto", None).type == ("cuda" if usable else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none_says_what_is_missing() -> None:
    with pytest.raises(BuildError, match=r"backend='cuda'.*use backend='host'"):
        Buffer(CONFIG, World.single(), "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda:3", "cuda", torch.device("cuda", 3), 3])
def test_a_gpu_that_was_named_is_never_replaced_by_the_host(device: Any) -> None:
    for backend in ("auto", "cuda"):
        with pytest.raises(BuildError, match=r"device=.*use backend='host' without a device"):
            choose_device(backend, device)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="backend='auto', device='cuda:3'"):
        Buffer(CONFIG, World.single(), device="cuda:3")
    with pytest.raises(BuildError, match="backend='auto', device=5"):
        virtual_ranks(CONFIG, 2, devices=[5, 7])
    with pytest.raises(BuildError, match="backend='auto', device=5"):
        virtual_normal_ranks(2, max_tokens=4, devices=[5, 7])


def test_the_host_backend_takes_no_gpu() -> None:
    for device in ("cuda:3", torch.device("cuda", 3), 3):
        with pytest.raises(ConfigError, match=r"device=.*backend='host'.*leave the device out"):
            choose_device("host", device)
    with pytest.raises(ConfigError, match="device=5 with backend='host'"):
        virtual_ranks(CONFIG, 2, "host", [5, 7])
    with pytest.raises(ConfigError, match="device='cuda:3'"):
        NormalBuffer(World.single(), max_tokens=4, backend="host", device="cuda:3")
    for same in ("cpu", torch.device("cpu")):
        assert choose_device("host", same) == torch.device("cpu")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="backend='gpu'.*'auto', 'host' or 'cuda'"):
        virtual_ranks(CONFIG, 2, "gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["banana", -1, 3.5, [0]])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(
        ConfigError, match="device=.* a torch.device, its name, a GPU's index or None"
    ):
        choose_device("host", device)


def test_a_wrong_variable_on_one_rank_is_told_to_all() -> None:
    """Else the others would wait for that rank as long as they may."""
    for outcome in run_ranks(builds_with_a_wrong_variable, 2, timeout_s=60):
        assert outcome.result is not None
        for told, seconds in outcome.result:
            assert "ConfigError" in told
            assert "banana" in told
            assert seconds < 20


def test_memory_that_is_not_there_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="ask for less"):
        NormalBuffer(World.single(), max_tokens=16, pool_bytes=1 << 44, backend="host")


def test_empty_list_of_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"devices=\[\]"):
        virtual_ranks(CONFIG, 2, "cuda", [])


def test_a_buffer_alone_works() -> None:
    with Buffer(CONFIG, World.single(), "host") as buffer:
        idx, weights = torch.tensor([[0, 3]]), torch.ones(1, 2)
        received = buffer.dispatch_fused(torch.ones(1, 128).bfloat16(), idx, weights)
        assert received.recv_count.tolist() == [1, 0, 0, 1]
        y = torch.full((4, 4, 128), 3.0).bfloat16()
        assert buffer.combine_fused(y, received.handle).tolist() == [[6.0] * 128]
        assert repr(buffer).startswith("Buffer(rank 0 of 1, cpu, shm")


def test_equal_ranks_agree() -> None:
    _raise_differences([{"topk": 4}] * 3, ["a"] * 3)


def test_the_odd_rank_is_named_with_both_values() -> None:
    with pytest.raises(ConfigError, match=r"rank 2 has topk=5 \(not 4\); ranks \[0, 1\] agree"):
        _raise_differences([{"topk": 4}, {"topk": 4}, {"topk": 5}], ["a", "a", "b"])


def test_rank_0_is_right_where_there_is_no_majority() -> None:
    with pytest.raises(ConfigError, match=r"rank 1 has memory='ipc' \(not 'nvshmem'\)"):
        _raise_differences([{"memory": "nvshmem"}, {"memory": "ipc"}], ["a", "a"])


def test_equal_fields_and_another_hash_mean_another_build() -> None:
    with pytest.raises(ConfigError, match="rank 1 has another build"):
        _raise_differences([{"topk": 4}] * 2, ["a", "b"])
