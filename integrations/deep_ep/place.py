"""Where a Buffer's operations run: its device, found out late, and its communication stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ep_runtime.connect import choose_device
from ep_runtime.errors import CaptureError
from ep_runtime.integrations.deep_ep.events import CommStream, EventHandle, EventOverlap
from ep_runtime.world import World

T = TypeVar("T")


class Place:
    """The device of the first tensor that comes, or where none came yet, the machine's best."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._comm: CommStream | None = None

    def on(self, tensor: torch.Tensor) -> CommStream:
        """The communication stream, on `tensor`'s device if nothing was asked for before."""
        if self._comm is None:
            self._comm = CommStream(tensor.device)
        return self._comm

    @property
    def comm(self) -> CommStream:
        """The communication stream."""
        if self._comm is None:
            self._comm = CommStream(choose_device("auto", None))
        return self._comm

    @property
    def device(self) -> torch.device:
        return self.comm.device

    def capturing(self) -> bool:
        """The current stream is being captured."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def refuse_capture(self, what: str, remedy: str) -> None:
        """Raise CaptureError in a capture: `what` is about to be made, which takes the host."""
        if self.capturing():
            raise CaptureError(f"{what} during a capture: {remedy} before it")

    def run(
        self,
        step: Callable[[], T],
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
    ) -> tuple[T, EventOverlap]:
        """Run `step`: on the current stream, or where asynchrony was asked for, beside it.

        The EventOverlap holds an event only with async_finish.
        """
        comm = self.comm
        if not async_finish:
            if previous_event is not None and previous_event.event is not None:
                previous_event.event.current_stream_wait()
            with comm.here():
                return step(), EventOverlap()
        with comm.beside(previous_event):
            return step(), EventOverlap(EventHandle())
