"""Overlap only where it is measured to pay, and on all ranks or on none."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ep_runtime.errors import ConfigError
from ep_runtime.scheduler.clock import Clock, default_clock
from ep_runtime.scheduler.run import (
    MicroBatch,
    Observer,
    SpanKind,
    run_interleaved,
    run_serial,
)
from ep_runtime.scheduler.timeline import Span, Timeline, predict
from ep_runtime.world import World

Runner = Callable[[Sequence[MicroBatch], Observer], list[Any]]
MakeBatches = Callable[[], Sequence[MicroBatch]]

_TRACES = 5  # runs traced per order; the one of median length is shown


@dataclass(frozen=True, slots=True)
class OverlapPlan:
    """Which order to run, and why. Times are the slowest rank's medians.

    serial, predicted, interleaved: this rank's timelines, or None where only totals were measured.
    """

    interleave: bool
    serial_us: float
    interleaved_us: float
    serial: Timeline | None = None
    predicted: Timeline | None = None
    interleaved: Timeline | None = None

    @property
    def speedup(self) -> float:
        """Serial over interleaved time: above 1 where overlap pays."""
        return self.serial_us / self.interleaved_us

    @property
    def reason(self) -> str:
        chosen = "interleaved" if self.interleave else "serial"
        return (
            f"{chosen}: serial {self.serial_us:.1f} us, interleaved {self.interleaved_us:.1f} us "
            f"({self.speedup:.2f}x)"
        )

    def run(self, batches: Sequence[MicroBatch]) -> list[Any]:
        """Run micro-batches in the chosen order."""
        return run_interleaved(batches) if self.interleave else run_serial(batches)

    def draw(self, width: int = 64) -> str:
        """The timelines under each other at one scale; `#` computes and sends, `.` waits."""
        named = [
            ("serial, measured", self.serial),
            ("interleaved, predicted", self.predicted),
            ("interleaved, measured", self.interleaved),
        ]
        shown = [(title, timeline) for title, timeline in named if timeline is not None]
        scale = max((timeline.total_us for _, timeline in shown), default=0.0)
        return "\n".join([self.reason, *(t.draw(title, scale, width) for title, t in shown)])


def choose(
    serial: Callable[[], object],
    interleaved: Callable[[], object],
    *,
    clock: Clock | None = None,
    world: World | None = None,
    repeats: int = 20,
    warmup: int = 3,
    min_gain: float = 0.02,
) -> OverlapPlan:
    """Time two ways to run the same step (for example the replays of two graphs).

    `clock`: where none is given, CUDA events on the current stream of the current device if CUDA
    is in use (`torch.cuda.is_initialized()`), else the host's clock, for which a step must be done
    when it returns. `clock_for(device)` makes the clock of another device, or of the CPU.
    `world`: a group of processes, which must all call this; the slowest rank's medians decide, so
    that every rank decides alike. Interleaving must gain `min_gain` of the serial time. Not
    capturable: synchronises. Raises ConfigError for `repeats` below 1 or `warmup` below 0, before
    anything runs.
    """
    _require_at_least("repeats", repeats, 1, "the median of no runs says nothing")
    _require_at_least("warmup", warmup, 0, "0 measures from the first run on")
    used = default_clock() if clock is None else clock
    times = [_median_us(step, used, repeats, warmup) for step in (serial, interleaved)]
    serial_us, interleaved_us = _slowest(times, world)
    return OverlapPlan(interleaved_us < serial_us * (1.0 - min_gain), serial_us, interleaved_us)


def plan(
    make_batches: MakeBatches,
    *,
    clock: Clock | None = None,
    world: World | None = None,
    repeats: int = 20,
    warmup: int = 3,
    min_gain: float = 0.02,
) -> OverlapPlan:
    """Run fresh micro-batches eagerly both ways, measure, predict and choose; see `choose`."""
    used = default_clock() if clock is None else clock
    chosen = choose(
        lambda: run_serial(make_batches()),
        lambda: run_interleaved(make_batches()),
        clock=used,
        world=world,
        repeats=repeats,
        warmup=warmup,
        min_gain=min_gain,
    )
    serial = _typical(make_batches, run_serial, used)
    interleaved = _typical(make_batches, run_interleaved, used)
    return OverlapPlan(
        chosen.interleave,
        chosen.serial_us,
        chosen.interleaved_us,
        serial,
        predict(serial),
        interleaved,
    )


def trace(
    batches: Sequence[MicroBatch], runner: Runner, clock: Clock
) -> tuple[list[Any], Timeline]:
    """Run once with a mark around every compute and wait; the results and the timeline."""
    marks: list[Any] = []
    labels: list[tuple[int, SpanKind]] = []

    def observe(lane: int, kind: SpanKind) -> AbstractContextManager[None]:
        @contextmanager
        def span() -> Iterator[None]:
            marks.append(clock.mark())
            yield
            marks.append(clock.mark())
            labels.append((lane, kind))

        return span()

    results = runner(batches, observe)
    at = clock.read(marks)
    spans = (Span(*label, at[2 * i], at[2 * i + 1]) for i, label in enumerate(labels))
    return results, Timeline(tuple(spans))


def _require_at_least(name: str, value: int, least: int, why: str) -> None:
    if value < least:
        raise ConfigError(f"{name}={value}: it must be at least {least} ({why})")


def _median_us(step: Callable[[], object], clock: Clock, repeats: int, warmup: int) -> float:
    for _ in range(warmup):
        step()
    pairs: list[Any] = []
    for _ in range(repeats):
        pairs.append(clock.mark())
        step()
        pairs.append(clock.mark())
    at = clock.read(pairs)
    return statistics.median(at[i + 1] - at[i] for i in range(0, len(at), 2))


def _typical(make_batches: MakeBatches, runner: Runner, clock: Clock) -> Timeline:
    runs = [trace(make_batches(), runner, clock)[1] for _ in range(_TRACES)]
    return sorted(runs, key=lambda timeline: timeline.total_us)[_TRACES // 2]


def _slowest(times: Sequence[float], world: World | None) -> list[float]:
    if world is None or world.num_ranks == 1:
        return list(times)
    form = f"<{len(times)}d"
    everyone = [struct.unpack(form, raw) for raw in world.all_gather(struct.pack(form, *times))]
    return [max(column) for column in zip(*everyone, strict=True)]
