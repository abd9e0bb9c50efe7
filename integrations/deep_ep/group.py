"""A World from what DeepEP's users have: a process group of torch.distributed, or an MPI comm."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ep_runtime import env
from ep_runtime.errors import ConfigError
from ep_runtime.world import World

HOST = "127.0.0.1"  # all ranks share a machine: they reach each other's memory


class Comm(Protocol):
    """What is used of an mpi4py communicator, at construction only."""

    def Get_rank(self) -> int: ...  # noqa: N802 - mpi4py's names
    def Get_size(self) -> int: ...  # noqa: N802
    def bcast(self, obj: Any, root: int = 0) -> Any: ...


def world_of(group: dist.ProcessGroup | None, comm: Comm | None) -> World:
    """Collective over the group: every rank makes its Buffers in the same order.

    Only the group's store is used, so its backend and device do not matter.
    Raises ConfigError unless exactly one of the two is given.
    """
    if (group is None) == (comm is None):
        raise ConfigError(
            f"group={group!r}, comm={comm!r}: pass a torch.distributed ProcessGroup as group, or"
            " an mpi4py communicator as comm"
        )
    if comm is not None:
        return _world_of_comm(comm)
    assert group is not None
    return World.from_store(group.get_group_store(), group.rank(), group.size())


def _world_of_comm(comm: Comm) -> World:
    """Rank 0 opens a store, MPI tells the others its port."""
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        return World.single()
    limit = timedelta(seconds=env.read().warmup_timeout_s)
    if rank == 0:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=limit)
        comm.bcast(store.port, root=0)
    else:
        store = TCPStore(HOST, comm.bcast(None, root=0), is_master=False, timeout=limit)
    return World.from_store(store, rank, size)
