"""A World from what DeepEP's users have: a process group of torch.distributed, or an MPI comm."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ep_runtime import env
from ep_runtime.connect import host_id
from ep_runtime.errors import ConfigError, PeerTimeout
from ep_runtime.world import World

LOOPBACK = "127.0.0.1"


class Comm(Protocol):
    """What is used of an mpi4py communicator, at construction only."""

    def Get_rank(self) -> int: ...  # noqa: N802 - mpi4py's names
    def Get_size(self) -> int: ...  # noqa: N802
    def bcast(self, obj: Any, root: int = 0) -> Any: ...
    def allgather(self, sendobj: Any) -> list[Any]: ...


def check_nvlink_connections(group: dist.ProcessGroup | None) -> None:
    """Does nothing: DeepEP refuses PCIe GPUs without NVLink between them, this package does not.

    Whether ranks reach each other's memory is found out, and said, where memory is connected.
    """
    del group


def world_of(group: dist.ProcessGroup | None, comm: Comm | None) -> World:
    """Collective over the group: every rank makes its Buffers in the same order.

    Only the group's store is used, so its backend and device do not matter. Where both are given
    the group counts, as in DeepEP. Raises ConfigError if neither is, PeerTimeout if rank 0's store
    does not answer.
    """
    if group is not None:
        return World.from_store(group.get_group_store(), group.rank(), group.size())
    if comm is None:
        raise ConfigError(
            "group=None, comm=None: pass a torch.distributed ProcessGroup as group, or an mpi4py"
            " communicator as comm"
        )
    return _world_of_comm(comm)


def _world_of_comm(comm: Comm) -> World:
    """Rank 0 opens a store, MPI tells the others where."""
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        return World.single()
    # Containers of one machine have names of their own where they do not share its loopback; hosts
    # of a cluster may all be called localhost.
    hosts = comm.allgather((host_id(), socket.gethostname()))
    address = LOOPBACK if all(host == hosts[0] for host in hosts) else hosts[0][1]
    limit = env.read().warmup_timeout_s
    timeout = timedelta(seconds=limit)
    if rank == 0:
        # It listens on every interface; its own way there needs no name that resolves.
        store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        comm.bcast(store.port, root=0)
        return World.from_store(store, rank, size)
    port = comm.bcast(None, root=0)
    try:
        store = TCPStore(address, port, is_master=False, timeout=timeout)
    except dist.DistError as error:
        raise PeerTimeout(
            f"the store of rank 0 at {address}:{port} did not answer rank {rank} within {limit:g} s"
            f" ({error}); check that the name of rank 0's host resolves here and that the port is"
            " not blocked, or pass a torch.distributed group",
            rank=rank,
            peer=0,
        ) from error
    return World.from_store(store, rank, size)
