"""Heaps of one-process-per-GPU ranks: cudaMalloc on each GPU, mapped by the others through IPC."""

from __future__ import annotations

from ep_runtime.memory.base import MemorySizes, RankMemory
from ep_runtime.native import _C
from ep_runtime.world import World


def ipc_memory(world: World, sizes: MemorySizes, device: int) -> RankMemory:
    """This rank's heap on GPU `device`, and a mapping of every peer's. Collective."""
    heap = world.agree("allocating the heap", lambda: _C.DeviceMemory(sizes.heap, device))
    handles = world.all_gather(heap.ipc_handle())

    def map_peers() -> list[_C.IpcMapping | None]:
        return [
            None if rank == world.rank else _C.IpcMapping(handle, device)
            for rank, handle in enumerate(handles)
        ]

    peers = world.agree("mapping the peers' heaps (CUDA IPC)", map_peers)
    local = _C.DeviceMemory(sizes.local, device)
    fault = _C.PinnedMemory(sizes.fault)
    return RankMemory(
        kind="ipc",
        heaps=[heap.address if peer is None else peer.address for peer in peers],
        local=local.address,
        fault=fault.address,
        mappings=[peer for peer in peers if peer is not None],
        owned=[heap, local, fault],
    )
