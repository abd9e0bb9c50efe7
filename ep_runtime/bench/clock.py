"""Two clocks: replays of a CUDA graph between device events, and eager calls on the host clock.

Both start every replay with the ranks aligned and give one number per replay; what is done with the
numbers of all ranks is in `ep_runtime.bench.stats`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch

WARMUP_REPLAYS = 2
# About 1 ms: the host has queued the replay behind it before it ends, so no launch is timed.
ALIGN_CYCLES = 2_000_000

Mark = Callable[[str], None]
Body = Callable[[Mark], None]


class Clock(Protocol):
    """Times a body of device work. `mark(name)` in the body starts a section of that name."""

    timing: str
    section_timing: str

    def periods(self, body: Body, replays: int) -> list[float]:
        """Microseconds of the whole body, one number per replay; marks do nothing."""
        ...

    def sections(self, body: Body, replays: int) -> dict[str, list[float]]:
        """Microseconds that the sections of each name take together, one number per replay."""
        ...

    def once(self, body: Body) -> Callable[[], None]:
        """Something that runs the body the way it is timed, for the check before timing."""
        ...


class HostClock:
    """Calls the body from Python. Its numbers hold interpreter and scheduler time."""

    timing = "eager"
    section_timing = "eager"

    def __init__(self, meet: Callable[[], None]) -> None:
        self._meet = meet

    def periods(self, body: Body, replays: int) -> list[float]:
        def whole(mark: Mark) -> None:
            mark("body")
            body(_ignore)

        return self.sections(whole, replays)["body"]

    def sections(self, body: Body, replays: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {}
        for replay in range(-1, replays):  # the first is a warm-up
            stamps: list[tuple[str, float]] = []
            self._meet()
            body(partial(_stamp, stamps))
            _stamp(stamps, "")
            if replay >= 0:
                _collect(times, _differences(stamps))
        return times

    def once(self, body: Body) -> Callable[[], None]:
        return lambda: body(_ignore)


class CudaClock:
    """Captures the body into a CUDA graph, replays it and reads device events.

    `meet` is a host barrier; `align` queues something on the current stream that ends on all ranks
    at nearly the same time (a tiny all-reduce on a communicator of its own).
    """

    timing = "graph"
    section_timing = "graph-events"

    def __init__(self, meet: Callable[[], None], align: Callable[[], None]) -> None:
        self._meet = meet
        self._align = align

    def periods(self, body: Body, replays: int) -> list[float]:
        graph = self._capture(lambda: body(_ignore))
        times = []
        for replay in range(-WARMUP_REPLAYS, replays):
            start, end = timing_event(), timing_event()
            self._queue_alignment()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 0:
                times.append(start.elapsed_time(end) * 1e3)
        return times

    def sections(self, body: Body, replays: int) -> dict[str, list[float]]:
        events: list[tuple[str, torch.cuda.Event]] = []

        def mark(name: str) -> None:
            event = timing_event(in_graph=True)
            event.record()
            events.append((name, event))

        def marked() -> None:
            body(mark)
            mark("")

        graph = self._capture(marked)
        times: dict[str, list[float]] = {}
        for replay in range(-WARMUP_REPLAYS, replays):
            self._queue_alignment()
            graph.replay()
            torch.cuda.synchronize()
            if replay >= 0:
                origin = events[0][1]
                stamps = [(name, origin.elapsed_time(event) / 1e3) for name, event in events]
                _collect(times, _differences(stamps))
        return times

    def once(self, body: Body) -> Callable[[], None]:
        graph = self._capture(lambda: body(_ignore))

        def run() -> None:
            self._meet()
            graph.replay()
            torch.cuda.synchronize()

        return run

    def _queue_alignment(self) -> None:
        spin(ALIGN_CYCLES)
        self._align()

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of `body`, whose kernels must have run before; no rank replays before all can.

        thread_local: the watchdog thread of NCCL's process group queries events meanwhile.
        """
        torch.cuda.synchronize()
        self._meet()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # what ended the capture matters, not that it ended
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize()
        self._meet()
        return graph


def timing_event(*, in_graph: bool = False) -> torch.cuda.Event:
    """An event with a time; `in_graph`: captured as a node that records at every replay."""
    return torch.cuda.Event(enable_timing=True, external=in_graph)  # type: ignore[no-untyped-call]


def spin(cycles: int) -> None:
    """Queue a kernel of one block that waits so many clock cycles. Capturable."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _ignore(_name: str) -> None:
    """A mark where only the whole is timed."""


def _stamp(stamps: list[tuple[str, float]], name: str) -> None:
    stamps.append((name, time.perf_counter()))


def _differences(stamps: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds per name from (name, seconds) at the start of each section, the end last."""
    totals: dict[str, float] = {}
    for (name, start), (_, end) in pairwise(stamps):
        totals[name] = totals.get(name, 0.0) + (end - start) * 1e6
    return totals


def _collect(into: dict[str, list[float]], one: dict[str, float]) -> None:
    for name, value in one.items():
        into.setdefault(name, []).append(value)
