"""Both clocks: what is timed, what is left out, and in which order the ranks and the GPU do what.

The CUDA clock runs here on a stand-in for torch.cuda with a clock of its own: a launch takes the
microseconds it is told, an event reads the clock when the device reaches it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from ep_runtime.bench import clock as clock_module
from ep_runtime.bench.clock import WARMUP_REPLAYS, CudaClock, HostClock, Mark


@dataclass
class FakeGpu:
    """A device that runs what is launched at once, or records it while a graph captures."""

    now_us: float = 0.0
    log: list[str] = field(default_factory=list)
    capturing: list[Callable[[], None]] | None = None

    def launch(self, name: str, us: float) -> None:
        def run() -> None:
            self.now_us += us
            self.log.append(name)

        self.queue(run)

    def queue(self, run: Callable[[], None]) -> None:
        if self.capturing is None:
            run()
        else:
            self.capturing.append(run)


def event_of(device: FakeGpu) -> type:
    class Event:
        def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
            assert enable_timing
            self.external = external

        def record(self) -> None:
            # A plain event inside a capture makes an edge, not a time stamp.
            assert device.capturing is None or self.external
            device.queue(self._stamp)

        def _stamp(self) -> None:
            self.at_us = device.now_us

        def synchronize(self) -> None:
            device.log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return (end.at_us - self.at_us) / 1e3

    return Event


def graph_of(device: FakeGpu) -> type:
    class Graph:
        def __init__(self) -> None:
            self.nodes: list[Callable[[], None]] = []

        def capture_begin(self, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            device.log.append("begin")
            device.capturing = self.nodes

        def capture_end(self) -> None:
            device.log.append("end")
            device.capturing = None

        def replay(self) -> None:
            device.log.append("replay")
            for node in self.nodes:
                node()

    return Graph


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    device = FakeGpu()
    for name, value in {
        "Event": event_of(device),
        "CUDAGraph": graph_of(device),
        "Stream": object,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: device.launch("sleep", cycles / 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def cuda_clock(gpu: FakeGpu) -> CudaClock:
    return CudaClock(lambda: gpu.log.append("meet"), lambda: gpu.launch("align", 7.0))


def test_a_period_is_the_time_of_the_graph_alone(gpu: FakeGpu) -> None:
    def body(mark: Mark) -> None:
        mark("dispatch")
        gpu.launch("dispatch", 4.0)
        mark("combine")
        gpu.launch("combine", 6.0)

    assert cuda_clock(gpu).periods(body, 3) == pytest.approx([10.0] * 3)
    replays = 3 + WARMUP_REPLAYS
    assert gpu.log.count("replay") == replays
    assert gpu.log.count("dispatch") == replays  # captured, never run while capturing


def test_every_replay_starts_aligned(gpu: FakeGpu) -> None:
    cuda_clock(gpu).periods(lambda _mark: gpu.launch("work", 1.0), 2)
    starts = [place for place, what in enumerate(gpu.log) if what == "replay"]
    assert all(gpu.log[place - 2 : place] == ["sleep", "align"] for place in starts)


def test_no_rank_replays_before_all_have_captured(gpu: FakeGpu) -> None:
    cuda_clock(gpu).periods(lambda _mark: gpu.launch("work", 1.0), 1)
    assert gpu.log[:4] == ["meet", "begin", "end", "meet"]


def test_warm_up_replays_are_not_counted(gpu: FakeGpu) -> None:
    def slow_at_first() -> None:
        gpu.now_us += 500.0 if gpu.log.count("replay") <= WARMUP_REPLAYS else 5.0

    times = cuda_clock(gpu).periods(lambda _mark: gpu.queue(slow_at_first), 2)
    assert times == pytest.approx([5.0, 5.0])


def test_sections_of_one_name_are_added_up_per_replay(gpu: FakeGpu) -> None:
    def body(mark: Mark) -> None:
        for us in (1.0, 2.0):
            mark("send")
            gpu.launch("send", us)
            mark("recv")
            gpu.launch("recv", 10 * us)

    sections = cuda_clock(gpu).sections(body, 2)
    assert sections == {"send": pytest.approx([3.0, 3.0]), "recv": pytest.approx([30.0, 30.0])}


def test_a_check_replays_as_often_as_it_is_asked(gpu: FakeGpu) -> None:
    run = cuda_clock(gpu).once(lambda _mark: gpu.launch("work", 1.0))
    assert gpu.log.count("work") == 0
    run()
    run()
    assert gpu.log.count("work") == 2


def test_an_error_while_capturing_ends_the_capture_and_comes_through(gpu: FakeGpu) -> None:
    def body(_mark: Mark) -> None:
        raise ValueError("no such expert")

    with pytest.raises(ValueError, match="no such expert"):
        cuda_clock(gpu).periods(body, 1)
    assert gpu.capturing is None


@pytest.fixture
def host_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the host clock, to be moved on by the test."""
    now = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    return now


def test_the_host_clock_times_the_body_and_not_the_meeting(host_time: list[float]) -> None:
    def wait(seconds: float) -> None:
        host_time[0] += seconds

    def body(mark: Mark) -> None:
        mark("dispatch")
        wait(3e-6)
        mark("combine")
        wait(4e-6)

    clock = HostClock(lambda: wait(1.0))
    assert clock.periods(body, 2) == pytest.approx([7.0, 7.0], abs=1e-3)
    sections = clock.sections(body, 2)
    assert sections["dispatch"] == pytest.approx([3.0, 3.0], abs=1e-3)
    assert sections["combine"] == pytest.approx([4.0, 4.0], abs=1e-3)


def test_the_host_clock_calls_the_body_once_more_than_it_counts(host_time: list[float]) -> None:
    calls = []
    HostClock(lambda: None).periods(lambda _mark: calls.append(host_time[0]), 4)
    assert len(calls) == 5
