"""2, 4 and 8 ranks as real processes on one GPU or two, under NVIDIA's MPS daemon.

Every process gets its share of the SMs, so that one rank's waits cannot keep another's sends from
starting; without the daemon ranks of one GPU would take turns, milliseconds at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from groups import ProcessGroup, ProcessPool
from support import (
    check_combined,
    check_received,
    new_rng,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference

pytestmark = pytest.mark.gpu

CONTROL = "nvidia-cuda-mps-control"


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A daemon of this test's own; the environment that finds it."""
    if shutil.which(CONTROL) is None:
        pytest.skip(f"{CONTROL} is not installed")
    place = tmp_path_factory.mktemp("mps")
    found = {"CUDA_MPS_PIPE_DIRECTORY": str(place), "CUDA_MPS_LOG_DIRECTORY": str(place)}
    environment = {**os.environ, **found}
    subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=20)
    yield found
    subprocess.run([CONTROL], input="quit\n", text=True, env=environment, check=True, timeout=20)


def share_of(num_ranks: int) -> dict[str, str]:
    per_gpu = -(-num_ranks // torch.cuda.device_count())
    return {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // per_gpu),
    }


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_processes_that_share_gpus_match_the_reference(mps: dict[str, str], num_ranks: int) -> None:
    pool = ProcessPool(
        num_ranks, "cuda", environment={**mps, **share_of(num_ranks), "EP_MEMORY": "ipc"}
    )
    rng = new_rng()
    config = EpConfig(num_experts=32, topk=8, hidden=7168, max_tokens=32)
    try:
        group = ProcessGroup(config, pool)
        for turn in range(6):
            inputs = random_inputs(rng, config, num_ranks, padded=True)
            expected = reference.dispatch(config, inputs)
            fused = turn % 2 == 1
            dispatch = group.dispatch_fused if fused else group.dispatch
            combine = group.combine_fused if fused else group.combine
            check_received(dispatch(inputs, turn % 2), expected)
            outputs = random_outputs(rng, expected)
            check_combined(combine(outputs, turn % 2), config, inputs, outputs)
        group.close()
    finally:
        pool.stop()
