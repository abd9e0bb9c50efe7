"""Replacing the data heap by a larger one, on all ranks at once."""

from __future__ import annotations

from dataclasses import replace

from ep_runtime.errors import CaptureError
from ep_runtime.memory.base import log
from ep_runtime.normal.config import HEAP_STEP
from ep_runtime.normal.heap import DataHeap, HeapSizes
from ep_runtime.normal.rank import NormalRank


class GrowingRank(NormalRank):
    """A rank whose data heap grows where an operation needs more than it was built for."""

    _parts: tuple[GrowingRank, ...]

    def reserve(self, *, max_tokens: int | None = None, max_hidden: int | None = None) -> None:
        """Make the heap large enough for so many tokens or channels. Collective where it grows.

        Every rank passes the same. For what the buffer was not built for, before a capture (which
        cannot grow the heap). Never shrinks.
        Raises ConfigError for sizes out of range, CaptureError where it would grow in a capture,
        ShapeError where it would grow and rows cross nodes by puts, and whatever allocating raises;
        the buffer then takes what it took before.
        """
        self._check_fatal()
        old = self.config
        asked = replace(  # which checks them
            old,
            max_tokens=old.max_tokens if max_tokens is None else max_tokens,
            max_hidden=old.max_hidden if max_hidden is None else max_hidden,
        )
        config = replace(
            old,
            max_tokens=max(old.max_tokens, asked.max_tokens),
            max_hidden=max(old.max_hidden, asked.max_hidden),
        )
        config.validate_for(self.num_ranks)
        # Of the parts as well: one may have grown before another fails.
        configs = [(one, one.config) for one in (self, *self._parts)]
        self.config = config
        wanted, before = self.config.heap_sizes(self.num_ranks), self.stats.growths
        try:
            self._make_room(wanted.staging, wanted.inbox)
            for part in self._parts:  # a node's rank has a multiple of a rank's tokens
                share = part.config.max_tokens // old.max_tokens
                part.reserve(
                    max_tokens=share * self.config.max_tokens, max_hidden=self.config.max_hidden
                )
        except BaseException:
            for one, its in configs:
                one.config = its
            raise
        if self._parts and self.stats.growths != before:
            self.world.barrier()  # parts grew with their members alone: see NodePath

    def _make_room(self, staging: int, inbox: int) -> None:
        """Replace the data heap unless its parts hold so many bytes.

        Every rank must come with the same numbers: then all grow or none does. Collective and
        synchronising where it grows. Raises CaptureError there in a capture.
        """
        have = self._heap.sizes
        if staging <= have.staging and inbox <= have.inbox:
            return
        if self._streams.capturing():
            raise CaptureError(
                f"this capture needs {staging} bytes to receive and {inbox} to combine, the data"
                f" heap has {have.staging} and {have.inbox} and cannot grow in a capture; call"
                " reserve() on every rank (or dispatch once eagerly with this size) before it"
            )
        grown = HeapSizes(_stepped(staging, have.staging), _stepped(inbox, have.inbox), have.pool)
        if self.config.pool_bytes is None:
            grown = HeapSizes(grown.staging, grown.inbox, max(have.pool, 2 * grown.staging))
        log.info("rank %d: the data heap grows from %s to %s", self.rank, have, grown)
        self._ops.synchronize()
        # Nobody writes to the old heaps any more, but for captured graphs; and no kernel waits for
        # a rank of this process while the driver hands out memory.
        self.world.barrier()
        memory = self._provider(grown.total)
        old, self._heap = self._heap, DataHeap(memory, self.rank, grown, self.device)
        self._ops = self._make_ops()
        self._apply_budget(self._budget_s)
        if not old.captured and not old.collective:
            old.unmap_peers()
        self._retired.append(old)
        self.stats.growths += 1
        self.world.barrier()
        self._free_retired()
        # Freeing waits for the whole device, where another rank's next kernel may wait for ours.
        self.world.barrier()

    def _free_retired(self) -> None:
        """Give back replaced heaps in which nothing lies any more. Waits for the device if it does.

        Virtual ranks that share a device may do so only where all of them meet: elsewhere a peer's
        kernel may be on it that waits for what this rank has yet to launch.
        """
        kept = []
        for heap in self._retired:
            if heap.idle and not heap.collective:
                heap.free()
            else:
                kept.append(heap)
        self._retired = kept


def _stepped(needed: int, have: int) -> int:
    return max(have, -(-needed // HEAP_STEP) * HEAP_STEP)
