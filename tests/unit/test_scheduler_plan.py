"""Measuring, predicting, choosing and drawing, with a clock that the test moves."""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch

from ep_runtime import ConfigError, current
from ep_runtime.scheduler import (
    CudaClock,
    HostClock,
    Span,
    Timeline,
    choose,
    default_clock,
    plan,
    predict,
    run_interleaved,
    run_serial,
    trace,
)
from ep_runtime.world import World


class ManualClock:
    """Time in microseconds that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def read(self, marks: Sequence[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]


class Flight:
    """A message that arrives `us` after it was sent."""

    def __init__(self, clock: ManualClock, us: float) -> None:
        self._clock, self._arrival = clock, clock.now + us

    def wait(self) -> None:
        self._clock.now = max(self._clock.now, self._arrival)


def batch(clock: ManualClock, compute: Sequence[float], flight: float) -> Generator[Any, Any, str]:
    for us in compute[:-1]:
        clock.now += us
        yield Flight(clock, flight)
    clock.now += compute[-1]
    return "done"


def test_trace_reports_what_happened_when() -> None:
    clock = ManualClock()
    results, timeline = trace([batch(clock, [5, 7], 3)], run_serial, clock)
    assert results == ["done"]
    assert timeline.spans == (
        Span(0, "compute", 0, 5),
        Span(0, "wait", 5, 8),
        Span(0, "compute", 8, 15),
    )
    assert timeline.total_us == 15
    assert timeline.us("wait") == 3


@pytest.mark.parametrize(
    ("compute", "flight"),
    [([10, 10, 10], 4), ([10, 10, 10], 40), ([1, 30, 2], 20), ([3], 9), ([5, 5], 0)],
)
def test_prediction_equals_the_run_where_messages_fly_freely(
    compute: list[float], flight: float
) -> None:
    clock = ManualClock()
    _, serial = trace([batch(clock, compute, flight) for _ in "AB"], run_serial, clock)
    _, measured = trace([batch(clock, compute, flight) for _ in "AB"], run_interleaved, clock)
    assert predict(serial) == measured
    assert measured.total_us <= serial.total_us


def test_prediction_charges_receives_that_find_everything_arrived() -> None:
    clock = ManualClock()
    _, serial = trace([batch(clock, [10, 10], 4) for _ in "AB"], run_serial, clock)
    assert predict(serial, receive_us=1).total_us == predict(serial).total_us + 2


def test_plan_interleaves_where_flight_hides_behind_compute() -> None:
    clock = ManualClock()
    made = plan(lambda: [batch(clock, [10, 10, 10], 8) for _ in "AB"], clock=clock)
    assert made.interleave
    assert made.serial_us == 2 * (30 + 16)
    assert made.interleaved_us == 60
    assert made.speedup == pytest.approx(92 / 60)
    assert made.run([batch(clock, [1], 0)]) == ["done"]
    assert made.predicted == made.interleaved


def test_plan_stays_serial_where_there_is_nothing_to_hide() -> None:
    clock = ManualClock()
    made = plan(lambda: [batch(clock, [10, 10], 0) for _ in "AB"], clock=clock)
    assert not made.interleave
    assert made.reason.startswith("serial: ")


def test_drawing_shows_both_orders_at_one_scale() -> None:
    clock = ManualClock()
    made = plan(lambda: [batch(clock, [10, 10], 20) for _ in "AB"], clock=clock)
    text = made.draw(width=40)
    serial_a = next(line for line in text.splitlines() if line.startswith("  A |"))
    assert serial_a == "  A |#####..........#####" + " " * 20 + "|"
    assert text.count("\n  B |") == 3
    assert "interleaved, predicted: 50.0 us" in text


def test_a_timeline_of_nothing_can_be_drawn() -> None:
    assert Timeline(()).draw("empty", 0.0) == "empty: 0.0 us"


@pytest.mark.parametrize(("gain", "interleave"), [(0.5, False), (0.05, True)])
def test_choice_needs_the_gain_that_was_asked_for(gain: float, interleave: bool) -> None:
    clock = ManualClock()

    def takes(us: float) -> None:
        clock.now += us

    made = choose(lambda: takes(100), lambda: takes(80), clock=clock, min_gain=gain)
    assert made.interleave is interleave
    assert (made.serial_us, made.interleaved_us) == (100, 80)


def test_the_slowest_rank_decides_for_all() -> None:
    clock = ManualClock()

    class OtherRankIsSlow(World):
        def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
            assert timeout_s is None
            return [data, struct.pack("<2d", 50, 90)]

    world = OtherRankIsSlow(None, 0, 1)
    world.num_ranks = 2

    def takes(us: float) -> None:
        clock.now += us

    made = choose(lambda: takes(60), lambda: takes(40), clock=clock, world=world)
    assert (made.serial_us, made.interleaved_us) == (60, 90)
    assert not made.interleave


class Gpu:
    """Stands for a device that works on after a launch has returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_at_us = 0.0
        self.asked: list[torch.device] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                assert stream == "the current stream"
                self.at_us = gpu.free_at_us

            def synchronize(self) -> None:
                """All work is done already."""

            def elapsed_time(self, end: Event) -> float:
                return (end.at_us - self.at_us) / 1e3

        def stream(device: torch.device) -> str:
            self.asked.append(device)
            return "the current stream"

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(current, "stream", stream)

    def launch(self, us: float) -> None:
        self.free_at_us += us


def test_where_cuda_is_in_use_its_work_is_timed_not_its_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch)
    made = choose(lambda: gpu.launch(4000), lambda: gpu.launch(2000))
    assert made.serial_us == pytest.approx(4000)
    assert made.interleaved_us == pytest.approx(2000)
    assert made.interleave
    assert set(gpu.asked) == {torch.device("cuda", 3)}

    def micro_batch() -> Generator[Any, Any, None]:
        gpu.launch(500)
        return
        yield

    made = plan(lambda: [micro_batch()])
    assert made.serial_us == pytest.approx(500)
    assert made.serial is not None
    assert made.serial.total_us == pytest.approx(500)


def test_the_default_clock_is_the_hosts_until_cuda_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert isinstance(default_clock(), HostClock)
    Gpu(monkeypatch)
    assert isinstance(default_clock(), CudaClock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats=0: it must be at least 1"),
        ({"repeats": -1}, "repeats=-1: it must be at least 1"),
        ({"warmup": -1}, "warmup=-1: it must be at least 0"),
    ],
)
@pytest.mark.parametrize("measure", [choose, plan])
def test_too_few_runs_are_refused_before_any(
    measure: Any, options: dict[str, int], message: str
) -> None:
    steps = [lambda: pytest.fail("ran")] * (2 if measure is choose else 1)
    with pytest.raises(ConfigError, match=message):
        measure(*steps, clock=ManualClock(), **options)


def test_one_run_without_warm_up_is_enough() -> None:
    runs: list[str] = []
    choose(lambda: runs.append("a"), lambda: runs.append("b"), repeats=1, warmup=0)
    assert runs == ["a", "b"]
