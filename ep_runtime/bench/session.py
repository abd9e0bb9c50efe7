"""Everything that lives for a whole run on one rank: device, clock, groups, Buffers, peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from ep_runtime import env
from ep_runtime.bench import process_group
from ep_runtime.bench.clock import Clock, CudaClock, HostClock
from ep_runtime.bench.link import link_rate
from ep_runtime.bench.machine import describe
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.records import Machine
from ep_runtime.bench.sharing import count_sharing, pair_barrier
from ep_runtime.bench.team import Team
from ep_runtime.connect import choose_device
from ep_runtime.errors import ConfigError
from ep_runtime.world import World


@dataclass(slots=True)
class Session:
    """One rank's share of a run.

    link_gbs       GB/s one way, given or measured; None: not known, or ranks share a GPU
    ranks_per_gpu  above 1, `group` is Gloo's: NCCL takes one rank per GPU
    """

    options: LowLatencyOptions
    team: Team
    device: torch.device
    clock: Clock
    store: Store
    group: dist.ProcessGroup
    machine: Machine
    link_gbs: float | None
    num_sms: int
    ranks_per_gpu: int

    @property
    def shares_gpus(self) -> bool:
        return self.ranks_per_gpu > 1


@contextmanager
def open_session(world: World, options: LowLatencyOptions) -> Iterator[Session]:
    """Join the ranks and find out what there is. Collective."""
    device = choose_device(options.backend, None)
    environment = process_group.set_environment(graph_mixing=options.graph_mixing)
    num_sms = _limit_sms(options.num_sms)
    team = Team(world)
    store = process_group.shared_store(world)
    sharing = _ranks_per_gpu(team, device)
    nccl = device.type == "cuda" and sharing == 1
    group = process_group.start_group(store, world.rank, world.num_ranks, device, nccl=nccl)
    machine = describe(device, options.command, options.commit, environment)
    with ExitStack() as held:
        clock: Clock
        rate = options.link_gbs
        if device.type == "cpu":
            clock = HostClock(team.meet)
        elif nccl:
            clock = CudaClock(team.meet, process_group.device_barrier(device))
            if rate is None:
                rate = team.gather(link_rate(device) if world.rank == 0 else None)[0]
        else:
            barrier = pair_barrier(store, world.rank, world.num_ranks, device)
            clock = CudaClock(team.meet, held.enter_context(barrier))
            rate = None
        yield Session(options, team, device, clock, store, group, machine, rate, num_sms, sharing)
        # Only after a run that came to its end: a collective that hangs would keep this waiting.
        team.meet()
    dist.destroy_process_group()


def _ranks_per_gpu(team: Team, device: torch.device) -> int:
    """The most ranks that are on one GPU; 1 on the CPU."""
    own = f"rank {team.rank}"
    if device.type == "cuda":
        own = str(torch.cuda.get_device_properties(device).uuid)
    return count_sharing(team.gather(own))


def _limit_sms(wanted: int) -> int:
    """Tell our kernels how many SMs they may use; returns what is in force (0: all)."""
    if wanted:
        env.set_default(env.variable("num_sms"), str(wanted))
    limit = env.read().num_sms
    if wanted and limit != wanted:
        raise ConfigError(
            f"num_sms={wanted} but {env.variable('num_sms')}={limit} is set; unset one of them"
        )
    return limit
