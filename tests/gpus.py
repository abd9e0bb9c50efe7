"""How many GPUs the tests of several GPUs use. Tests marked multi need two."""

from __future__ import annotations

import pytest
import torch

SIZES = (8, 4, 2)  # their numbers of experts are multiples of these

# Environment of a process that is one rank, and of what it starts. tests/conftest.py asks for other
# values for ranks that are threads, which a process only suffers from: all kernels take seconds to
# load, and MPS has so few queues that four processes with 32 each are refused ("out of memory").
OWN_PROCESS = {"CUDA_MODULE_LOADING": "LAZY", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def num_gpus() -> int:
    """Two, four or eight, as many as there are; two where the tests will be skipped.

    A function, for processes that set their environment before they look for a GPU."""
    count = torch.cuda.device_count()
    return next((size for size in SIZES if size <= count), SIZES[-1])


def sharing_ranks() -> list[int]:
    """Numbers of ranks that put at least two on some GPU: 2, 4 and 8, or twice the GPUs."""
    count = max(1, torch.cuda.device_count())
    return [size for size in (2, 4, 8) if size > count] or [2 * num_gpus()]


def marks_of_many(kind: str, name: str) -> list[pytest.MarkDecorator]:
    """Of a place on several GPUs. Processes take long to start: one worker runs all their tests."""
    marks = [pytest.mark.multi]
    return [*marks, pytest.mark.xdist_group(name)] if kind == "processes" else marks
