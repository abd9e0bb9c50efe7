"""Events, and the communication stream with its order relative to the caller's streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from ep_runtime.errors import SequenceError, ShapeError
from ep_runtime.normal.streams import StreamOrder


class EventHandle:
    """A point on the stream that is current when it is made.

    Where this process has no work on a GPU there is nothing to wait for: CPU operations are done
    when they return.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def current_stream_wait(self) -> None:
        """Let the current stream go on only behind this point. Does not block the host."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event, or none, and tensors to keep until it is dropped.

    As a context manager: work inside overlaps with what the event waits for, and the current
    stream waits at the end of the block.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: Sequence[torch.Tensor] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._release_after_block = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Let the current stream wait for the event, then call the hook. release_handle: drop the
        event. Raises SequenceError if there is none."""
        if self.event is None:
            raise SequenceError(
                "current_stream_wait() on an EventOverlap without an event: the call that returned"
                " it ran on the current stream already; pass async_finish=True, or do not wait"
            )
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], object]) -> None:
        """Call it once, behind the next wait. Raises SequenceError if one is there already."""
        if self.hook_after_wait is not None:
            raise SequenceError(
                "register_hook_after_wait() while another hook is registered: call"
                " current_stream_wait() first, or register one function that does both"
            )
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For `with overlap(release_handle=True):`: itself; drop the event behind the block."""
        self._release_after_block = release_handle
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        release, self._release_after_block = self._release_after_block, False
        if self.event is not None:
            self.current_stream_wait(release)


class CommStream:
    """The communication stream of one Buffer on one device; on the CPU there is only one order.

    Calls that are not asynchronous run on the caller's stream, where they cost no detour. All use
    the same memory and counters, so each waits for the one before, whatever stream that was on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # A number below that of ordinary streams is a higher priority.
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._order = StreamOrder(device)

    @contextmanager
    def beside(self, previous_event: EventOverlap | None) -> Iterator[None]:
        """Run the block on the communication stream, behind `previous_event` if that has one,
        else behind the current stream."""
        stream = self.stream
        if stream is None:
            yield
            return
        with torch.cuda.device(self.device):
            if previous_event is None or previous_event.event is None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if previous_event is not None and previous_event.event is not None:
                    previous_event.event.current_stream_wait()
                self._order.enter()
                yield

    @contextmanager
    def here(self) -> Iterator[None]:
        """Run the block on the current stream, behind the operation before."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device):
            self._order.enter()
            yield

    def join(self) -> None:
        """Let the current stream wait for the last operation, if that ran on another."""
        self._order.enter()

    def lend(self, used: Sequence[torch.Tensor], made: Sequence[torch.Tensor] = ()) -> None:
        """Tell the allocator who uses what: the communication stream tensors of the current
        stream, the current stream those that were made on the communication stream.

        Not while capturing: memory would pile up in the graph; there the EventOverlap holds them.
        """
        stream = self.stream
        if stream is None or torch.cuda.is_current_stream_capturing():
            return
        current = torch.cuda.current_stream(self.device)
        for tensor in used:
            tensor.record_stream(stream)
        for tensor in made:
            tensor.record_stream(current)


def _can_be_awaited(overlap: object) -> bool:
    """DeepEP takes whatever has `event`; what has none it would not wait for, without a word."""
    missing = object()
    event = getattr(overlap, "event", missing)
    return event is None or hasattr(event, "current_stream_wait")


def check_async(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    """Where DeepEP asserts: allocating on the communication stream needs an event and async."""
    if previous_event is not None and not _can_be_awaited(previous_event):
        raise ShapeError(
            f"previous_event is a {type(previous_event).__name__}: it must be an EventOverlap;"
            " Buffer.capture() makes one"
        )
    if allocate_on_comm_stream and not (previous_event is not None and async_finish):
        raise SequenceError(
            f"allocate_on_comm_stream=True with async_finish={async_finish} and"
            f" previous_event={previous_event}: it takes async_finish=True and a previous_event;"
            " Buffer.capture() makes one"
        )
