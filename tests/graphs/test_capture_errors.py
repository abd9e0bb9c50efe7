"""A capture that breaks, with stand-ins for what torch.cuda.graph calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ep_runtime.graphs import capture


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def capture_begin(self, *_: Any, **__: Any) -> None:
        if self._cuda.fails_at == "begin":
            raise RuntimeError("capture cannot begin")
        self._cuda.recording = True

    def capture_end(self) -> None:
        if self._cuda.fails_at == "end":
            raise RuntimeError("capture was invalidated")
        self._cuda.recording = False


class FakeCuda:
    """A current stream, and a pool that a capture records to."""

    pool = (0, 1)

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.stream: Any = "the capture's"  # as an attribute of the site
        self.current: Any = "the caller's"
        self.recording = False

    @contextmanager
    def make_current(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def leave_pool(self) -> None:
        assert self.recording
        self.recording = False


def captured(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    monkeypatch.setattr(torch.cuda, "stream", cuda.make_current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    graph: Any = FakeGraph(cuda)
    site: Any = cuda
    try:
        with capture._capturing(graph, site):
            assert cuda.current == "the capture's"
            step()
    finally:
        assert cuda.current == "the caller's"
        assert not cuda.recording


def fails() -> None:
    try:
        raise LookupError("no such expert")
    except LookupError as error:
        raise ValueError("broken step") from error


def nothing() -> None:
    """A step that ends well."""


def test_a_capture_that_ends_well_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    captured(FakeCuda(), monkeypatch, nothing)


@pytest.mark.parametrize("fails_at", ["", "end"])
def test_what_the_step_raised_is_raised(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="broken step") as caught:
        captured(FakeCuda(fails_at), monkeypatch, fails)
    assert isinstance(caught.value.__cause__, LookupError)
    seen = []
    error: BaseException | None = caught.value
    while error is not None:
        seen.append(str(error))
        error = error.__context__
    assert seen == ["broken step", *["capture was invalidated"] * bool(fails_at), "no such expert"]


@pytest.mark.parametrize("fails_at", ["begin", "end"])
def test_a_capture_error_alone_comes_through(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="capture"):
        captured(FakeCuda(fails_at), monkeypatch, nothing)
