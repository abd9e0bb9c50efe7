"""Several ranks in one process: for tests, for debugging, and where ranks outnumber GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from ep_runtime.buffer import Buffer
from ep_runtime.config import EpConfig
from ep_runtime.connect import Backend, choose_device
from ep_runtime.errors import ConfigError
from ep_runtime.layout import layout_of
from ep_runtime.memory.virtual import virtual_cuda_memory, virtual_host_memory
from ep_runtime.order import SendOrder
from ep_runtime.world import VirtualWorld


def virtual_ranks(
    config: EpConfig,
    num_ranks: int,
    backend: Backend = "auto",
    devices: Sequence[int] | None = None,
) -> list[Buffer]:
    """`num_ranks` ranks of this process, rank r on GPU devices[r % len(devices)] (or on the CPU).

    Issue every rank's dispatch() (or combine()) before any of their wait()s: ranks that share a
    GPU or the CPU are checked, and on a GPU their receives are ordered by events after all their
    sends, in eager calls and in captures. Collective calls (reset(), close()) are made rank by
    rank. Raises ConfigError, also for devices with backend="host"; BuildError where the devices are
    not there or cannot reach each other's memory.
    """
    sizes = layout_of(config, num_ranks).sizes
    first = choose_device(backend, None if devices is None else _first(devices))
    if first.type == "cpu":
        placement = [first] * num_ranks
        memories = virtual_host_memory(num_ranks, sizes)
    else:
        chosen = [first.index] if devices is None else list(devices)
        placement = [choose_device("cuda", chosen[r % len(chosen)]) for r in range(num_ranks)]
        memories = virtual_cuda_memory([device.index for device in placement], sizes)
    order = SendOrder(placement, config.num_chains)
    return [
        Buffer._virtual(config, VirtualWorld(rank, num_ranks), device, memory, order)
        for rank, (device, memory) in enumerate(zip(placement, memories, strict=True))
    ]


def _first(devices: Sequence[int]) -> int:
    if not devices:
        raise ConfigError("devices=[]: give at least one GPU index, or None for the current GPU")
    return devices[0]
