"""What the ranks of a normal buffer agree on before they get their memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from ep_runtime import env
from ep_runtime.connect import agree_on, host_id
from ep_runtime.errors import ConfigError
from ep_runtime.memory import MemorySizes
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.normal.config import BetweenNodes, NormalConfig
from ep_runtime.world import World


def control_sizes(config: NormalConfig, num_ranks: int) -> MemorySizes:
    """Bytes of the words that ranks wait for, of a rank's own words, and of its fault record."""
    config.validate_for(num_ranks)
    native = _C.normal_layout(num_ranks, config.max_experts)
    return MemorySizes(native["control_bytes"], native["local_bytes"], _C.fault_bytes())


def resolve_nodes(config: NormalConfig, world: World) -> NormalConfig:
    """Say what between_nodes="auto" means here. Collective.

    "direct" where all ranks are on one host, whatever nodes were declared; else "nvshmem".
    """
    if config.ranks_per_node is None or config.between_nodes != "auto":
        return config
    hosts = set(world.all_gather(host_id().encode()))
    chosen: BetweenNodes = "direct" if len(hosts) == 1 else "nvshmem"
    log.info("between_nodes auto: %s (%d hosts)", chosen, len(hosts))
    return replace(config, between_nodes=chosen)


def resolve_virtual(config: NormalConfig) -> NormalConfig:
    """The same for ranks of one process. Raises ConfigError for what takes several."""
    if config.between_nodes == "nvshmem":
        raise ConfigError(
            "between_nodes='nvshmem' for virtual ranks: NVSHMEM has one rank in a process; use"
            " 'direct', 'puts', or processes"
        )
    if config.ranks_per_node is None or config.between_nodes != "auto":
        return config
    return replace(config, between_nodes="direct")


def most_sms(device: torch.device, neighbours: int) -> int:
    """SMs that one of `neighbours` ranks of a GPU may take, so that all of them run at once."""
    if device.type == "cpu":
        return 1
    total = _C.cuda_device_attributes(device.index)["num_sms"]
    limit = env.read().num_sms or total
    return max(1, min(limit, total // neighbours))


def agree(config: NormalConfig, world: World, device: torch.device) -> tuple[str, int]:
    """(kind of memory, ranks on this GPU). Collective; raises ConfigError on every rank."""
    trouble, asked = "", "auto"
    try:
        config.validate_for(world.num_ranks)
        asked = env.read().memory
    except ConfigError as error:
        trouble = str(error)
    by_nvshmem = config.between_nodes == "nvshmem"
    if by_nvshmem and device.type == "cpu":
        trouble = (
            "between_nodes='nvshmem' with the host backend: NVSHMEM moves rows between GPUs; use"
            " 'direct' or 'puts', on one host"
        )
    # Gigabytes of receive memory do not fit the symmetric heap, whose size is fixed when NVSHMEM
    # starts: it is used where it was asked for by name.
    wanted = "nvshmem" if asked == "nvshmem" else "ipc"
    if wanted == "nvshmem" and config.layered(world.num_ranks):
        trouble = (
            "EP_MEMORY=nvshmem with ranks_per_node: a rail and a node map their memory by CUDA IPC;"
            " leave EP_MEMORY at auto, and say between_nodes='nvshmem' to cross by it"
        )
    fields, fingerprint = config.fields(world.num_ranks), config.fingerprint(world.num_ranks)
    agreed = agree_on(fields, fingerprint, trouble, world, device, wanted, one_host=not by_nvshmem)
    return agreed.kind, agreed.neighbours
