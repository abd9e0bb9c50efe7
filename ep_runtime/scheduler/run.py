"""The order in which micro-batches send, compute and receive.

With micro-batches A and B the interleaved order is

    compute A, send A | compute B, send B | receive A, compute A, send A | receive B ...

on one stream: linear, so that a graph captures it as a chain, and free of deadlock, because on
every rank a chain's send precedes its receive and no send waits for a later receive. All ranks must
run the same order: a group of which some ranks interleave and others do not waits in a circle.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

from ep_runtime.errors import SequenceError

T_co = TypeVar("T_co", covariant=True)


class Waitable(Protocol[T_co]):
    """What a micro-batch yields: a `Pending`, or anything with its `wait()`."""

    def wait(self) -> T_co: ...


Stage = Generator[Waitable[Any], Any, Any]
# Virtual ranks: one generator per rank, which advance together.
MicroBatch = Stage | Sequence[Stage]

SpanKind = Literal["compute", "wait"]
Observer = Callable[[int, SpanKind], AbstractContextManager[None]]


def _unobserved(_lane: int, _kind: SpanKind) -> AbstractContextManager[None]:
    return nullcontext()


def run_interleaved(batches: Sequence[MicroBatch], observe: Observer = _unobserved) -> list[Any]:
    """Drive all micro-batches in turn; returns their results in order.

    A micro-batch given as a list of generators (the ranks of a virtual group) returns the list of
    their results; all its ranks send before any of them receives. Micro-batches in flight together
    need a chain each. Capturable. Raises SequenceError where the ranks of a micro-batch do not
    communicate equally often; what a generator raises passes through, and the others are closed:
    what they raise in turn becomes a note (PEP 678) on that first error.
    """
    lanes = [_Lane(i, batch, observe) for i, batch in enumerate(batches)]
    with _closing(lanes):
        active = [lane for lane in lanes if lane.compute()]
        while active:
            active = [lane for lane in active if lane.wait() and lane.compute()]
    return [lane.result for lane in lanes]


def run_serial(batches: Sequence[MicroBatch], observe: Observer = _unobserved) -> list[Any]:
    """The same results without overlap: each micro-batch runs to its end before the next starts."""
    lanes = [_Lane(i, batch, observe) for i, batch in enumerate(batches)]
    with _closing(lanes):
        for lane in lanes:
            while lane.compute():
                lane.wait()
    return [lane.result for lane in lanes]


@contextmanager
def _closing(lanes: Sequence[_Lane]) -> Iterator[None]:
    """After an error, which stays the one that is raised, close every generator.

    Without one they have all ended.
    """
    try:
        yield
    except BaseException as first:
        for lane in lanes:
            lane.close(first)
        raise


class _Lane:
    """One micro-batch: the generators of its ranks, kept in step."""

    def __init__(self, index: int, batch: MicroBatch, observe: Observer) -> None:
        self._index = index
        self._observe = observe
        self._single = isinstance(batch, Generator)
        self._stages: list[Stage] = [batch] if isinstance(batch, Generator) else list(batch)
        self._values: list[Any] = [None] * len(self._stages)
        self._pending: list[Waitable[Any]] = []
        self._results: list[Any] = []

    @property
    def result(self) -> Any:
        return self._results[0] if self._single else self._results

    def compute(self) -> bool:
        """Advance every rank to its next send. False when the micro-batch has ended."""
        self._pending, self._results = [], []
        with self._observe(self._index, "compute"):
            for stage, value in zip(self._stages, self._values, strict=True):
                try:
                    self._pending.append(stage.send(value))
                except StopIteration as stop:
                    self._results.append(stop.value)
        if self._pending and self._results:
            raise SequenceError(
                f"micro-batch {self._index}: {len(self._results)} of {len(self._stages)} ranks "
                "ended while the others sent; every rank must dispatch and combine equally often "
                "(with zero tokens where it has none)"
            )
        return bool(self._pending)

    def wait(self) -> bool:
        """Receive on every rank."""
        with self._observe(self._index, "wait"):
            self._values = [pending.wait() for pending in self._pending]
        return True

    def close(self, first: BaseException) -> None:
        """Close every rank's generator; what that raises is noted on the first error."""
        for stage in self._stages:
            try:
                stage.close()
            except BaseException as later:  # noqa: BLE001 - noted: the first error is raised
                _note(first, f"closing micro-batch {self._index} raised as well:", later)


def _note(first: BaseException, told: str, later: BaseException) -> None:
    """BaseException.add_note(), which Python has from 3.11 on; 3.10 keeps notes unprinted."""
    trace = "".join(traceback.format_exception(later, chain=False))
    first.__dict__.setdefault("__notes__", []).append(f"{told}\n{trace.rstrip()}")
