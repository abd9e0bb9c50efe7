"""The one wait of the host: how many rows an exact dispatch brings."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ep_runtime import current
from ep_runtime.errors import PeerTimeout
from ep_runtime.native import _C

GRACE_S = 5.0  # beyond the device's own time budget, after which the record names who is missing
LOOKS = 64  # reads of the ready word between two looks at the fault record


@dataclass(frozen=True, slots=True)
class Counts:
    """What a notify told the host.

    rows        rows that this rank receives
    most_rows   the largest such number of any rank
    most_inbox  rows that the rank with the most remote tokens gets back in a combine
    per_expert  rows of each local expert, rounded up to the alignment
    """

    rows: int
    most_rows: int
    most_inbox: int
    per_expert: list[int]


class HostCounts:
    """Words that a notify writes and the host polls; pinned where the writer is a GPU.

    One notify at a time uses them: the host waits for it before the next.
    """

    def __init__(self, num_ranks: int, max_experts: int, device: torch.device) -> None:
        self._device = device
        most_local = -(-max_experts // num_ranks)
        size = 4 * (4 + most_local)
        on_host = device.type == "cpu"
        self._memory = _C.HostMemory(size) if on_host else _C.PinnedMemory(size)
        array = (ctypes.c_int32 * (size // 4)).from_address(self._memory.address)
        self._words = memoryview(array).cast("B").cast("i")
        self._bytes = size
        # Behind whatever the stream held before the notify.
        self._began = None if on_host else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def prepare(self) -> int:
        """Forget the last counts, on the current stream; the address for the next notify."""
        ctypes.memset(self._memory.address, 0, self._bytes)
        if self._began is not None:
            self._began.record(current.stream(self._device))
        return self._memory.address

    def wait(self, local_experts: int, budget_s: float, check: Callable[[], None]) -> Counts:
        """Poll until the notify has written its counts.

        check  raises what the device recorded: a peer that did not come ends the wait there
        Raises PeerTimeout where the device says nothing for longer than it may wait.
        """
        words, ready = self._words, 1 + local_experts
        deadline: float | None = None
        started = time.monotonic()
        looks = 0
        while words[ready] == 0:
            time.sleep(0)  # other ranks of this process need the interpreter
            looks += 1
            if looks % LOOKS:
                continue
            check()
            now = time.monotonic()
            if deadline is None:
                # The stream may have other work before the notify: the clock starts behind it.
                if now - started > budget_s and self._has_begun():
                    deadline = now + budget_s + GRACE_S
            elif now > deadline:
                raise PeerTimeout(
                    f"no counts from the device {now - started:.1f} s after a notify was launched"
                    f" (time budget {budget_s:g} s), and no fault on record: the GPU does not"
                    " run; look at its other processes, then end the group",
                    rank=-1,
                    peer=-1,
                )
        return Counts(words[0], words[ready + 1], words[ready + 2], list(words[1:ready]))

    def _has_begun(self) -> bool:
        return self._began is None or bool(
            self._began.query()  # type: ignore[no-untyped-call]
        )

    def close(self) -> None:
        """Give the words back; nothing may write to them any more."""
        self._words = memoryview(b"").cast("i")
        self._memory.close()
