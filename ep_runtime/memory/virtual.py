"""Heaps of virtual ranks: many ranks of one process, on the CPU or on one or more GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from ep_runtime.errors import BuildError
from ep_runtime.memory.base import MemorySizes, RankMemory, lacking
from ep_runtime.native import _C


def virtual_host_memory(num_ranks: int, sizes: MemorySizes) -> list[RankMemory]:
    """Memory of `num_ranks` CPU ranks. Every rank keeps all heaps alive."""
    with lacking():
        heaps = [_C.HostMemory(sizes.heap) for _ in range(num_ranks)]
        return [
            _rank_memory(
                "virtual-host", heaps, _C.HostMemory(sizes.local), _C.HostMemory(sizes.fault)
            )
            for _ in range(num_ranks)
        ]


def virtual_cuda_memory(placement: Sequence[int], sizes: MemorySizes) -> list[RankMemory]:
    """Memory of one rank per entry of `placement`, on the GPU of that index."""
    _join(sorted(set(placement)))
    heaps = [_C.DeviceMemory(sizes.heap, device) for device in placement]
    return [
        _rank_memory(
            "virtual-cuda",
            heaps,
            _C.DeviceMemory(sizes.local, device),
            _C.PinnedMemory(sizes.fault),
        )
        for device in placement
    ]


def _rank_memory(
    kind: str,
    heaps: Sequence[_C.HostMemory | _C.DeviceMemory],
    local: _C.HostMemory | _C.DeviceMemory,
    fault: _C.HostMemory | _C.PinnedMemory,
) -> RankMemory:
    # The heaps are shared objects: they go when the last rank of the group is closed or dropped.
    return RankMemory(
        kind=kind,
        heaps=[heap.address for heap in heaps],
        local=local.address,
        fault=fault.address,
        mappings=[_Share(heaps)],
        owned=[local, fault],
    )


class _Share:
    """One rank's hold on heaps that all virtual ranks use."""

    def __init__(self, heaps: Sequence[object]) -> None:
        self._heaps: Sequence[object] = heaps

    def close(self) -> None:
        self._heaps = ()


def _join(devices: list[int]) -> None:
    for device in devices:
        for peer in devices:
            if device == peer:
                continue
            if not _C.can_access_peer(device, peer):
                raise BuildError(
                    f"GPU {device} cannot reach GPU {peer}'s memory; spread the virtual ranks"
                    " over GPUs with peer access (see `ep-runtime doctor`), or use one GPU"
                )
            _C.enable_peer_access(device, peer)
