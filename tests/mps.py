"""NVIDIA's MPS daemon for a test module: processes that share a GPU run at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpus import OWN_PROCESS

CONTROL = "nvidia-cuda-mps-control"


@contextmanager
def daemon(place: Path) -> Iterator[dict[str, str]]:
    """A daemon of the caller's own; the environment that finds it. Skips where there is none."""
    if shutil.which(CONTROL) is None:
        pytest.skip(f"{CONTROL} is not installed")
    found = {"CUDA_MPS_PIPE_DIRECTORY": str(place), "CUDA_MPS_LOG_DIRECTORY": str(place)}
    environment = {**os.environ, **OWN_PROCESS, **found}
    subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=20)
    # The daemon shows its GPUs to clients, which count them from 0.
    gpus = ",".join(map(str, range(torch.cuda.device_count())))
    yield {**found, "CUDA_VISIBLE_DEVICES": gpus}
    subprocess.run([CONTROL], input="quit\n", text=True, env=environment, check=True, timeout=20)


def share_of(num_ranks: int) -> dict[str, str]:
    """Every process its part of the SMs, so that no rank's waits keep another from starting."""
    per_gpu = -(-num_ranks // torch.cuda.device_count())
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // per_gpu)}
