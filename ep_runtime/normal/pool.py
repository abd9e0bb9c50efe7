"""Receive memory on the host's books: which stretch of the data heap belongs to whom.

No memory is touched here. A block that was given back may still be read by kernels on the stream
where its last tensor was used: the pool keeps the event that says when, and whoever gets the
memory next waits for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT = 128  # of blocks: rows are moved in whole lines

# stream handle -> (number, event): the last use of freed memory on that stream
Uses = Mapping[int, tuple[int, Any]]


@dataclass(slots=True)
class Block:
    """Bytes [offset, offset + num_bytes) of the data heap, with one owner.

    captured  taken during a capture: whatever replays will write to it for ever, so it serves
              captures alone once it is given back
    uses      events to wait for before the first write
    """

    offset: int
    num_bytes: int
    captured: bool
    uses: Uses = field(default_factory=dict)


@dataclass(slots=True)
class _Free:
    start: int
    end: int
    uses: Uses


class Pool:
    """First fit over one stretch of the data heap. Safe from any thread and from finalizers."""

    def __init__(self, start: int, num_bytes: int) -> None:
        self._free = [_Free(start, start + num_bytes, {})] if num_bytes else []
        self._free_captured: list[_Free] = []
        # A finalizer can run anywhere, also on a thread that is in here: it appends, and where it
        # asks for `blocks` it finds the lists busy and leaves them alone.
        self._lock = threading.RLock()
        self._busy = False
        self._returned: deque[tuple[Block, tuple[int, Any] | None]] = deque()
        self._number = 0
        self._in_use = 0
        self._blocks = 0

    @property
    def in_use(self) -> int:
        """Bytes that tensors (or captures) hold."""
        with self._lock:
            self._take_back()
            return self._in_use

    @property
    def blocks(self) -> int:
        """Blocks that tensors hold."""
        with self._lock:
            self._take_back()
            return self._blocks

    def allocate(self, num_bytes: int, *, capturing: bool) -> Block | None:
        """A block of at least `num_bytes`, or None where no free stretch is long enough."""
        size = _rounded(num_bytes)
        with self._lock:
            self._take_back()
            self._busy = True
            try:
                return self._take(size, capturing)
            finally:
                self._busy = False

    def _take(self, size: int, capturing: bool) -> Block | None:
        block = _cut(self._free_captured, size, capturing) if capturing else None
        if block is None:
            block = _cut(self._free, size, capturing)
            if block is not None:
                self._in_use += size
        if block is not None:
            self._blocks += 1
        return block

    def divide(self, block: Block, first: int, second: int) -> Block | None:
        """Leave a block its first `first` bytes, and make the `second` bytes behind them a block of
        their own: each is given back by itself. Free the rest, which nobody has touched.

        first: a multiple of ALIGNMENT, unless second=0; then there is no second block.
        """
        start, end = block.offset + _rounded(first), block.offset + block.num_bytes
        with self._lock:
            self._busy = True
            try:
                block.num_bytes = start - block.offset
                other = None
                if second:
                    other = Block(start, _rounded(second), block.captured, block.uses)
                    start += other.num_bytes
                    self._blocks += 1
                if start < end:
                    self._release(_Free(start, end, block.uses), block.captured)
                return other
            finally:
                self._busy = False

    def give_back(self, block: Block, use: tuple[int, Any] | None) -> None:
        """Free a block. `use`: (stream, event recorded on it after the last use), or None."""
        self._returned.append((block, use))

    def _take_back(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self._returned:
                self._free_one(*self._returned.popleft())
        finally:
            self._busy = False

    def _free_one(self, block: Block, use: tuple[int, Any] | None) -> None:
        self._blocks -= 1
        self._number += 1
        uses: Uses = {} if use is None else {use[0]: (self._number, use[1])}
        self._release(_Free(block.offset, block.offset + block.num_bytes, uses), block.captured)

    def _release(self, freed: _Free, captured: bool) -> None:
        if captured:
            _insert(self._free_captured, freed)  # still in use: a replay writes to it
        else:
            self._in_use -= freed.end - freed.start  # before it joins its neighbours
            _insert(self._free, freed)


def _rounded(num_bytes: int) -> int:
    return max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT


def _cut(free: list[_Free], size: int, captured: bool) -> Block | None:
    for index, one in enumerate(free):
        if one.end - one.start >= size:
            block = Block(one.start, size, captured, one.uses)
            one.start += size
            if one.start == one.end:
                del free[index]
            return block
    return None


def _insert(free: list[_Free], freed: _Free) -> None:
    """Keep the list sorted and its neighbours joined."""
    index = 0
    while index < len(free) and free[index].start < freed.start:
        index += 1
    free.insert(index, freed)
    for left in (index, index - 1):
        if left >= 0 and left + 1 < len(free) and free[left].end == free[left + 1].start:
            right = free.pop(left + 1)
            free[left].end = right.end
            free[left].uses = _later(free[left].uses, right.uses)


def _later(a: Uses, b: Uses) -> Uses:
    if not a or not b:
        return a or b
    merged = dict(a)
    for stream, use in b.items():
        if stream not in merged or merged[stream][0] < use[0]:
            merged[stream] = use
    return merged
