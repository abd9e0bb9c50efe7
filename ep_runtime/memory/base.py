"""What a rank holds: an address of every rank's heap, local memory, and a fault record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ep_runtime.errors import BuildError

log = logging.getLogger("ep_runtime")

HEAP_ALIGNMENT = 128  # a 128-byte line must lie in one cache line: the protocol depends on it
PAGE = 4096

# Memory that peers may still write to when a group ends badly: kept until the process ends.
_kept: list[object] = []


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Bytes of one rank's symmetric heap, local memory and fault record."""

    heap: int
    local: int
    fault: int

    @property
    def heap_stride(self) -> int:
        """Bytes between two heaps of one segment."""
        return -(-self.heap // PAGE) * PAGE


@contextmanager
def lacking() -> Iterator[None]:
    """What the system refuses is what this machine lacks."""
    try:
        yield
    except OSError as error:
        remedy = "ask for less (max_tokens, pool_bytes, num_chains), or make room"
        raise BuildError(f"{error}; {remedy}") from error


class Closable(Protocol):
    def close(self) -> None: ...


@dataclass(slots=True)
class RankMemory:
    """Addresses that a rank's operations use; owns what is behind them.

    heaps[r] is rank r's heap as this rank sees it; heaps[rank] is its own. `mappings` (of peers'
    memory) are closed before ranks meet for the last time, `owned` after it.
    """

    kind: str
    heaps: list[int]
    local: int
    fault: int
    mappings: list[Closable] = field(default_factory=list)
    owned: list[Closable] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rank, address in enumerate(self.heaps):
            if address % HEAP_ALIGNMENT:
                raise BuildError(
                    f"rank {rank}'s heap is at {address:#x}: it must be a multiple of"
                    f" {HEAP_ALIGNMENT} bytes; choose another EP_MEMORY"
                )

    def close(self, meet: Callable[[], bool]) -> None:
        """Give the memory back. `meet` waits for the peers and says whether they all came.

        Without them, memory that they may still write to is kept until the process ends.
        """
        mappings, self.mappings = self.mappings, []
        owned, self.owned = self.owned, []
        for mapping in mappings:
            mapping.close()
        if not owned:
            return
        if meet():
            for memory in owned:
                memory.close()
        else:
            _kept.extend(owned)

    def abandon(self) -> None:
        """Keep everything until the process ends: kernels in flight may still use it."""
        _kept.extend((*self.mappings, *self.owned))
        self.mappings, self.owned = [], []
