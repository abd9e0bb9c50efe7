"""The data heap of one rank: where peers put rows, and tensors over what they put there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ep_runtime import current
from ep_runtime.memory import RankMemory
from ep_runtime.memory.base import log
from ep_runtime.normal.pool import ALIGNMENT, Block, Pool


@dataclass(frozen=True, slots=True)
class HeapSizes:
    """Bytes of the three parts of a data heap; every rank of the group has the same.

    staging  where a dispatch receives for which the pool has no room
    inbox    where the rows of a combine come home
    pool     where received tensors live until they are dropped
    """

    staging: int
    inbox: int
    pool: int

    def __post_init__(self) -> None:
        for name in ("staging", "inbox", "pool"):
            rounded = -(-getattr(self, name) // ALIGNMENT) * ALIGNMENT
            object.__setattr__(self, name, rounded)

    @property
    def inbox_offset(self) -> int:
        return self.staging

    @property
    def pool_offset(self) -> int:
        return self.staging + self.inbox

    @property
    def total(self) -> int:
        """Bytes of the whole heap; never zero."""
        return max(self.staging + self.inbox + self.pool, ALIGNMENT)


class _Owner:
    """Bytes of a data heap as numpy and torch see them; the block goes back when it dies.

    Holds the heap as well: tensors outlive a heap that was replaced, and the Buffer.
    """

    _block: Block | None = None  # until it is made: __del__ comes also where that fails

    def __init__(
        self, heap: DataHeap, address: int, num_bytes: int, on_host: bool, block: Block | None
    ) -> None:
        self._heap = heap
        self._block = block
        interface = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        if on_host:
            self.__array_interface__ = interface
        else:
            self.__cuda_array_interface__ = interface

    def __del__(self) -> None:
        if self._block is not None and not sys.is_finalizing():
            self._heap.give_back(self._block)


class DataHeap:
    """One generation of a rank's data heap. Lives as long as anything lies in it.

    addresses[r] is rank r's heap as this rank sees it.
    """

    def __init__(self, memory: RankMemory, rank: int, sizes: HeapSizes, device: torch.device):
        self.sizes = sizes
        self.addresses = list(memory.heaps)
        self.pool = Pool(sizes.pool_offset, sizes.pool)
        self.captured = False  # a graph holds these addresses
        self._retired = False
        self._own = memory.heaps[rank]
        self._memory = memory
        self._device = device

    def view(self, offset: int, num_bytes: int, block: Block | None) -> torch.Tensor:
        """uint8 [num_bytes] at `offset`. With a block: owns it, and all its views do."""
        on_host = self._device.type == "cpu"
        owner = _Owner(self, self._own + offset, num_bytes, on_host, block)
        if on_host:
            return torch.from_numpy(np.asarray(owner))
        return torch.as_tensor(owner, device=self._device)

    @property
    def idle(self) -> bool:
        """No tensor lies in it and no graph names it."""
        return not self.captured and self.pool.blocks == 0

    @property
    def collective(self) -> bool:
        """Giving the memory back takes all ranks."""
        return self._memory.kind == "nvshmem"

    def unmap_peers(self) -> None:
        """Let go of the peers' heaps, so that they can be freed there. Own memory stays."""
        if self._memory.kind == "ipc":
            mappings, self._memory.mappings = self._memory.mappings, []
            for mapping in mappings:
                mapping.close()

    def free(self) -> None:
        """Give the memory back. Peers no longer write to it."""
        self._memory.close(lambda: True)

    def retire(self) -> None:
        """free(), as soon as the last tensor over it is dropped."""
        self._retired = True
        self._free_if_unused()

    def abandon(self) -> None:
        """Keep the memory until the process ends: something may still write to it."""
        self._memory.abandon()

    def give_back(self, block: Block) -> None:
        """A block's last tensor died; kernels on this thread's stream may still read it."""
        use: tuple[int, Any] | None = None
        if self._device.type == "cuda" and not block.captured:
            try:
                use = _mark(self._device)
            except RuntimeError as error:  # a lost context: nothing will run there any more
                log.warning("a block of a data heap is not used again: %s", error)
                return
        self.pool.give_back(block, use)
        if self._retired:
            self._free_if_unused()

    def _free_if_unused(self) -> None:
        if self.pool.blocks:
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.abandon()  # freeing would end somebody's capture
        else:
            self.free()


def _mark(device: torch.device) -> tuple[int, Any] | None:
    """(stream, event) behind everything that is queued on the current stream.

    None in a capture, where the event would belong to the graph: a capture begins with a
    synchronisation, so what read the block before it is over.
    """
    with current.on(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = current.stream(device)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return stream.cuda_stream, event
