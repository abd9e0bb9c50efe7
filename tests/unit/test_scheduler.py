"""The order that the scheduler emits, with receives that only write down when they are called."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from ep_runtime.errors import SequenceError
from ep_runtime.scheduler import Stage, run_interleaved, run_serial


class Receive:
    """Stands for a pending receive: `wait()` logs and returns what was sent, plus one."""

    def __init__(self, log: list[str], name: str, value: int) -> None:
        self._log, self._name, self._value = log, name, value

    def wait(self) -> int:
        self._log.append(f"recv {self._name}")
        return self._value + 1


def layers(log: list[str], name: str, value: int, count: int) -> Generator[Any, Any, int]:
    for _ in range(count):
        log.append(f"send {name}")
        value = yield Receive(log, name, value)
    log.append(f"end {name}")
    return value


def test_interleaved_receives_each_batch_after_the_other_has_sent() -> None:
    log: list[str] = []
    results = run_interleaved([layers(log, "A", 10, 2), layers(log, "B", 20, 2)])
    assert results == [12, 22]
    assert log == [
        "send A", "send B",
        "recv A", "send A", "recv B", "send B",
        "recv A", "end A", "recv B", "end B",
    ]  # fmt: skip


def test_serial_ends_one_batch_before_the_next_starts() -> None:
    log: list[str] = []
    results = run_serial([layers(log, "A", 0, 2), layers(log, "B", 5, 1)])
    assert results == [2, 6]
    assert log == ["send A", "recv A", "send A", "recv A", "end A", "send B", "recv B", "end B"]


def test_batches_of_different_length_all_end() -> None:
    log: list[str] = []
    lengths = [3, 0, 1]
    results = run_interleaved([layers(log, str(i), 0, n) for i, n in enumerate(lengths)])
    assert results == lengths
    assert log.count("recv 0") == 3
    assert log.index("end 1") < log.index("recv 0")


def test_no_batches_give_no_results() -> None:
    assert run_interleaved([]) == []
    assert run_serial([]) == []


@pytest.mark.parametrize("run", [run_interleaved, run_serial])
def test_virtual_ranks_all_send_before_any_receives(run: Any) -> None:
    log: list[str] = []
    groups = [[layers(log, f"{batch}{rank}", 0, 2) for rank in range(3)] for batch in "AB"]
    assert run(groups) == [[2, 2, 2], [2, 2, 2]]
    for batch in "AB":
        mine = [entry for entry in log if entry[-2] == batch]
        sends = [f"send {batch}{rank}" for rank in range(3)]
        receives = [f"recv {batch}{rank}" for rank in range(3)]
        # A rank computes right after its own receive in the log, so compare the kinds in blocks.
        assert mine[:6] == sends + receives
        assert mine[6:12] == sends + receives


def test_a_chain_never_receives_before_it_sent() -> None:
    log: list[str] = []
    run_interleaved([layers(log, name, 0, 5) for name in "ABC"])
    for name in "ABC":
        mine = [entry.split()[0] for entry in log if entry.endswith(name)]
        assert mine == ["send", "recv"] * 5 + ["end"]


def test_ranks_that_communicate_unequally_often_are_refused() -> None:
    log: list[str] = []
    group = [layers(log, "A0", 0, 2), layers(log, "A1", 0, 1)]
    with pytest.raises(SequenceError, match="1 of 2 ranks ended"):
        run_interleaved([group])


def test_an_error_passes_through_and_closes_the_other_batches() -> None:
    closed: list[str] = []

    def fails() -> Stage:
        yield Receive([], "A", 0)
        raise ValueError("broken layer")

    def watched() -> Stage:
        try:
            yield Receive([], "B", 0)
            yield Receive([], "B", 0)
        finally:
            closed.append("B")

    with pytest.raises(ValueError, match="broken layer"):
        run_interleaved([fails(), watched()])
    assert closed == ["B"]


def lane_that_fails_to_close(closed: list[str], name: str) -> Stage:
    try:
        yield Receive([], name, 0)
        yield Receive([], name, 0)
    finally:
        closed.append(name)
        raise RuntimeError(f"cleanup of {name}")


@pytest.mark.parametrize("run", [run_interleaved, run_serial])
def test_the_first_error_is_raised_and_those_of_closing_are_noted(run: Any) -> None:
    closed: list[str] = []

    def fails() -> Stage:
        try:
            yield Receive([], "A", 0)
            raise ValueError("broken layer")
        except ValueError as error:
            raise LookupError("no such layer") from error

    b0, b1, c = (lane_that_fails_to_close(closed, name) for name in ("B0", "B1", "C"))
    for stage in (b0, b1, c):
        next(stage)  # under way already, also where run_serial does not come to them
    with pytest.raises(LookupError, match="no such layer") as caught:
        run([fails(), [b0, b1], c])
    assert closed == ["B0", "B1", "C"]
    assert isinstance(caught.value.__cause__, ValueError)
    notes = caught.value.__notes__
    assert len(notes) == 3
    for note, (batch, name) in zip(notes, [(1, "B0"), (1, "B1"), (2, "C")], strict=True):
        assert note.startswith(f"closing micro-batch {batch} raised as well:\nTraceback")
        assert note.endswith(f"RuntimeError: cleanup of {name}")
        assert "broken layer" not in note


def test_a_failed_cleanup_of_the_batch_that_failed_is_its_error() -> None:
    closed: list[str] = []

    def fails() -> Stage:
        try:
            yield Receive([], "A", 0)
            raise ValueError("broken layer")
        finally:
            raise RuntimeError("cleanup of A")

    with pytest.raises(RuntimeError, match="cleanup of A") as caught:
        run_interleaved([fails(), lane_that_fails_to_close(closed, "B")])
    assert isinstance(caught.value.__context__, ValueError)
    assert closed == ["B"]
