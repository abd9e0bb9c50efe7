"""What the ranks of a normal buffer agree on before they get their memory."""

from __future__ import annotations

import torch

from ep_runtime import env
from ep_runtime.connect import agree_on
from ep_runtime.errors import ConfigError
from ep_runtime.memory import MemorySizes
from ep_runtime.native import _C
from ep_runtime.normal.config import NormalConfig
from ep_runtime.world import World


def control_sizes(config: NormalConfig, num_ranks: int) -> MemorySizes:
    """Bytes of the words that ranks wait for, of a rank's own words, and of its fault record."""
    config.validate_for(num_ranks)
    native = _C.normal_layout(num_ranks, config.max_experts)
    return MemorySizes(native["control_bytes"], native["local_bytes"], _C.fault_bytes())


def data_sizes(num_bytes: int) -> MemorySizes:
    """A data heap has no local words and no fault record: the control heap's are used."""
    return MemorySizes(num_bytes, 1, 1)


def most_sms(device: torch.device, neighbours: int) -> int:
    """SMs that one of `neighbours` ranks of a GPU may take, so that all of them run at once."""
    if device.type == "cpu":
        return 1
    total = _C.cuda_device_attributes(device.index)["num_sms"]
    limit = env.read().num_sms or total
    return max(1, min(limit, total // neighbours))


def agree(config: NormalConfig, world: World, device: torch.device) -> tuple[str, int]:
    """(kind of memory, ranks on this GPU). Collective; raises ConfigError on every rank."""
    trouble = ""
    try:
        config.validate_for(world.num_ranks)
    except ConfigError as error:
        trouble = str(error)
    # Gigabytes of receive memory do not fit the symmetric heap, whose size is fixed when NVSHMEM
    # starts: it is used where it was asked for by name.
    wanted = "nvshmem" if env.read().memory == "nvshmem" else "ipc"
    fields, fingerprint = config.fields(world.num_ranks), config.fingerprint(world.num_ranks)
    agreed = agree_on(fields, fingerprint, trouble, world, device, wanted)
    return agreed.kind, agreed.neighbours
