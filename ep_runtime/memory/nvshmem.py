"""Heaps of one-process-per-GPU ranks in NVSHMEM's symmetric memory (optional extension)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol, cast

from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.memory.base import MemorySizes, RankMemory, log
from ep_runtime.native import _C
from ep_runtime.world import World

EXTENSION = "ep_runtime._nvshmem"


class NvshmemModule(Protocol):
    """The functions of the extension. Pointers are integers; a peer out of reach is 0."""

    def get_unique_id(self) -> bytes: ...
    def init(self, rank: int, num_ranks: int, unique_id: bytes, device: int) -> None: ...
    def malloc(self, num_bytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def peer_address(self, pointer: int, rank: int) -> int: ...
    def barrier_all(self) -> None: ...
    def attach_kernels(self, rank: int, num_ranks: int, unique_id: bytes) -> None: ...
    def announce(self, *arguments: int) -> None: ...
    def put(self, *arguments: int) -> None: ...
    def finalize(self) -> None: ...


# NVSHMEM starts once per process. It is not finalised: that is collective, and a rank that died
# would hang the others; the driver frees the memory when the process ends.
_started: tuple[int, int, int] | None = None
_unique_id = b""
_attached = False  # the extension's own kernels may put


def load_nvshmem() -> NvshmemModule:
    """The extension. Raises BuildError where it was not built or its libraries do not load."""
    try:
        return cast(NvshmemModule, importlib.import_module(EXTENSION))
    except ImportError as error:
        raise BuildError(
            f"{EXTENSION} cannot be imported ({error}); install 'nvidia-nvshmem-cu13>=3.4.5,<4' and"
            " build again, or set EP_MEMORY=ipc"
        ) from error


def nvshmem_available() -> bool:
    """True if the extension loads; the reason why not is logged."""
    if importlib.util.find_spec(EXTENSION) is None:
        log.info("%s was not built", EXTENSION)
        return False
    try:
        load_nvshmem()
    except BuildError as error:
        log.warning("NVSHMEM is built but not usable: %s", error)
        return False
    return True


def nvshmem_running() -> bool:
    """True once a heap of this process was made of it."""
    return _started is not None


def _start(module: NvshmemModule, world: World, device: int) -> None:
    global _started, _unique_id
    wanted = (world.rank, world.num_ranks, device)
    if _started is not None and _started != wanted:
        raise ConfigError(
            f"NVSHMEM runs in this process as (rank, ranks, device) {_started} and cannot become"
            f" {wanted}; keep one group per process or set EP_MEMORY=ipc"
        )
    fresh = world.all_gather(b"fresh" if _started is None else b"started")
    if len(set(fresh)) > 1:
        raise ConfigError(
            "NVSHMEM runs in some ranks' processes and not in others'; build the same groups on"
            " every rank or set EP_MEMORY=ipc"
        )
    if _started is None:
        unique_id = world.broadcast(module.get_unique_id() if world.rank == 0 else b"")
        world.agree(
            "starting NVSHMEM",
            lambda: module.init(world.rank, world.num_ranks, unique_id, device),
        )
        _started, _unique_id = wanted, unique_id


class _Symmetric:
    """A symmetric allocation; freeing it is collective."""

    def __init__(self, module: NvshmemModule, pointer: int) -> None:
        self._module = module
        self._pointer = pointer

    def close(self) -> None:
        if self._pointer:
            self._module.free(self._pointer)
            self._pointer = 0


def nvshmem_memory(world: World, sizes: MemorySizes, device: int) -> RankMemory:
    """This rank's heap in the symmetric heap, peers by direct pointers. Collective."""
    module = world.agree("loading NVSHMEM", load_nvshmem)
    _start(module, world, device)

    def allocate() -> int:
        pointer = module.malloc(sizes.heap)
        if not pointer:
            raise BuildError(
                f"NVSHMEM has no room for a heap of {sizes.heap} bytes; raise"
                " NVSHMEM_SYMMETRIC_SIZE or lower max_tokens"
            )
        _C.cuda_fill_zero(pointer, sizes.heap, device)
        return pointer

    pointer = world.agree("allocating symmetric memory", allocate)

    def reach_peers() -> list[int]:
        heaps = [
            pointer if rank == world.rank else module.peer_address(pointer, rank)
            for rank in range(world.num_ranks)
        ]
        if 0 in heaps:
            raise BuildError(
                f"rank {heaps.index(0)}'s memory is out of reach of rank {world.rank}: the kernels"
                " need GPUs joined by NVLink or PCIe peer access; see `ep-runtime doctor`"
            )
        return heaps

    heaps = world.agree("reaching the peers' memory", reach_peers)
    local = _C.DeviceMemory(sizes.local, device)
    fault = _C.PinnedMemory(sizes.fault)
    return RankMemory(
        kind="nvshmem",
        heaps=heaps,
        local=local.address,
        fault=fault.address,
        owned=[_Symmetric(module, pointer), local, fault],
    )


def symmetric_region(world: World, num_bytes: int, device: int) -> RankMemory:
    """Memory that kernels of all ranks put into, near or far: heaps holds this rank's own alone.

    Zeroed. Collective; raises BuildError on every rank. Freeing it is collective too.
    """
    module = world.agree("loading NVSHMEM", load_nvshmem)
    _start(module, world, device)

    def attach() -> None:
        global _attached
        if not _attached:
            module.attach_kernels(world.rank, world.num_ranks, _unique_id)
            _attached = True

    world.agree("attaching the kernels that put", attach)

    def allocate() -> int:
        pointer = module.malloc(num_bytes)
        _C.cuda_fill_zero(pointer, num_bytes, device)
        return pointer

    pointer = world.agree("allocating symmetric memory", allocate)
    heaps = [0] * world.num_ranks
    heaps[world.rank] = pointer
    return RankMemory("nvshmem", heaps, 0, 0, owned=[_Symmetric(module, pointer)])
