"""torch.distributed beside our own world: the peers' process group, and the device barrier."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    TCPStore,
)

from ep_runtime import env
from ep_runtime.errors import BuildError
from ep_runtime.world import World

TIMEOUT = timedelta(seconds=60)
# What NCCL reads when its first communicator is made. NVLS (multicast in the switch) can be missing
# on a virtual machine, and a captured chain of collectives needs mixing off, or it is pathological.
NCCL_DEFAULTS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
GRAPH_MIXING = "NCCL_GRAPH_MIXING_SUPPORT"


def set_environment(*, graph_mixing: bool) -> str:
    """Set NCCL's variables unless the user has; returns them as "NAME=value ..."."""
    wanted = dict(NCCL_DEFAULTS)
    if not graph_mixing:
        wanted[GRAPH_MIXING] = "0"
    return " ".join(f"{name}={env.set_default(name, value)}" for name, value in wanted.items())


def shared_store(world: World) -> Store:
    """A store of all ranks, kept by rank 0. Collective; one host."""
    if world.rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world.broadcast(f"{socket.gethostname()} {store.port}".encode())
        return store
    host, port = world.broadcast(b"").decode().rsplit(" ", 1)
    if host != socket.gethostname():
        raise BuildError(
            f"rank {world.rank} runs on {socket.gethostname()}, rank 0 on {host}: this benchmark is"
            " for the ranks of one host; start all of them there"
        )
    return TCPStore("127.0.0.1", int(port), is_master=False, timeout=TIMEOUT)


def start_group(
    store: Store, rank: int, num_ranks: int, device: torch.device, *, nccl: bool
) -> dist.ProcessGroup:
    """The peers' group: NCCL's, or Gloo's. Uses one that is already there."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=PrefixStore("bench", store),
            rank=rank,
            world_size=num_ranks,
            timeout=TIMEOUT,
            device_id=device if nccl else None,
        )
    group = dist.group.WORLD
    if group is None:
        raise BuildError("torch.distributed has no default group; start the benchmark afresh")
    return group


def device_barrier(device: torch.device) -> Callable[[], None]:
    """Something that queues a barrier of all GPUs on the current stream.

    Its communicator is its own: with graph mixing off, no eager collective may run on one that a
    graph uses.
    """
    group = dist.new_group(backend="nccl", timeout=TIMEOUT)
    token = torch.zeros(1, device=device)

    def align() -> None:
        dist.all_reduce(token, group=group)

    align()
    torch.cuda.synchronize(device)
    return align
