"""Heaps of CPU ranks: one POSIX shared memory segment for a group of processes."""

from __future__ import annotations

import secrets
from contextlib import suppress

from ep_runtime.errors import EpError, PeerTimeout
from ep_runtime.memory.base import MemorySizes, RankMemory, lacking
from ep_runtime.native import _C
from ep_runtime.world import World

UNLINK_S = 5.0  # for rank 0 to take a name away before anybody raises


def host_memory(world: World, sizes: MemorySizes) -> RankMemory:
    """Heaps of all ranks in one segment, mode 0600. Collective.

    The name is random, and gone from /dev/shm before this returns: whatever kills the ranks
    later, the kernel frees the memory with the last of them.
    """
    num_bytes = sizes.heap_stride * world.num_ranks
    name = world.broadcast(f"/ep_runtime.{secrets.token_hex(16)}".encode()).decode()
    segment: _C.ShmSegment | None = None

    def attach(creator: bool) -> None:
        nonlocal segment
        if creator == (world.rank == 0):
            with lacking():
                segment = _C.ShmSegment(name, num_bytes, creator)

    try:
        world.agree("creating shared memory", lambda: attach(creator=True))
        world.agree("attaching shared memory", lambda: attach(creator=False))
    except BaseException as error:
        _unlink(world, segment)
        if isinstance(error, Exception) and not isinstance(error, PeerTimeout):
            # Whoever hears of a failure may end all ranks at once, rank 0 before it has unlinked.
            with suppress(EpError):
                world.barrier(timeout_s=UNLINK_S)
        raise
    _unlink(world, segment)
    assert segment is not None
    with lacking():
        local, fault = _C.HostMemory(sizes.local), _C.HostMemory(sizes.fault)
    return RankMemory(
        kind="shm",
        heaps=[segment.address + rank * sizes.heap_stride for rank in range(world.num_ranks)],
        local=local.address,
        fault=fault.address,
        mappings=[segment, local, fault],
    )


def _unlink(world: World, segment: _C.ShmSegment | None) -> None:
    if world.rank == 0 and segment is not None:
        segment.unlink()
