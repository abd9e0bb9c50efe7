"""When something happened: host time, or a stream's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ep_runtime import current


class Clock(Protocol):
    def mark(self) -> Any:
        """A point in the order of work; costs nothing that is worth measuring."""

    def read(self, marks: Sequence[Any]) -> list[float]:
        """Microseconds of each mark since the first. Synchronises; not for captured code."""


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def read(self, marks: Sequence[float]) -> list[float]:
        return [(mark - marks[0]) * 1e6 for mark in marks]


class CudaClock:
    """For work on the current stream of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        make_event: Any = torch.cuda.Event  # torch leaves it untyped
        event = make_event(enable_timing=True)
        event.record(current.stream(self._device))
        return event

    def read(self, marks: Sequence[Any]) -> list[float]:
        if marks:
            marks[-1].synchronize()
        return [marks[0].elapsed_time(mark) * 1e3 for mark in marks]


def clock_for(device: torch.device) -> Clock:
    """CUDA events for a GPU, the host's clock for the CPU."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def default_clock() -> Clock:
    """CUDA events of the current device once CUDA is in use, before that the host's clock."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return HostClock()
    return clock_for(torch.device("cuda", torch.cuda.current_device()))
