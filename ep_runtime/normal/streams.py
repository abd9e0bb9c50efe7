"""The order of one rank's operations where they are issued on more than one stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ep_runtime import current


class StreamOrder:
    """Keeps a rank's operations one behind the other, whatever streams they are launched on.

    Operations of a rank share their counters and its inbox. On one stream they are in order; when
    the stream changes, the new one waits for all that the last one holds at that moment. Between
    a capture and what is outside of it no event can be waited for: whoever replays a graph puts it
    where its operations belong, as for any graph. So captured and eager operations are each in an
    order of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: dict[bool, torch.cuda.Stream] = {}  # by whether it was being captured

    def capturing(self) -> bool:
        """The device's current stream is being captured."""
        return current.capturing(self._device)

    def enter(self) -> None:
        """Before an operation that communicates."""
        if self._device.type == "cpu":
            return
        stream, captured = current.stream(self._device), self.capturing()
        last = self._last.get(captured)
        self._last[captured] = stream
        if last is None or last.cuda_stream == stream.cuda_stream:
            return
        with torch.cuda.stream(last):
            last_captured = torch.cuda.is_current_stream_capturing()
        if last_captured == captured:  # else its capture is over, or has begun since
            stream.wait_stream(last)

    def wait_for(self, uses: Mapping[int, tuple[int, Any]]) -> None:
        """Let the current stream wait for the last uses of memory, except in a capture."""
        if not uses or self._device.type == "cpu":
            return
        stream = current.stream(self._device)
        others = [event for other, (_, event) in uses.items() if other != stream.cuda_stream]
        if others and not self.capturing():
            for event in others:
                stream.wait_event(event)
