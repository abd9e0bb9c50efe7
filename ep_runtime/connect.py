"""How the processes of a group find out that they fit together, and get their memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ep_runtime import env
from ep_runtime.config import EpConfig
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.layout import layout_of
from ep_runtime.memory import MemorySizes, RankMemory
from ep_runtime.memory.base import log
from ep_runtime.memory.host import host_memory
from ep_runtime.memory.ipc import ipc_memory
from ep_runtime.memory.nvshmem import load_nvshmem, nvshmem_available, nvshmem_memory
from ep_runtime.native import _C
from ep_runtime.world import World

Backend = Literal["auto", "host", "cuda"]


def choose_device(backend: Backend, device: torch.device | int | str | None) -> torch.device:
    """The device that `backend` means: "auto" is the current GPU where there is one.

    Raises BuildError where CUDA or a GPU is asked for and missing, ConfigError for an unknown
    backend or a device that the backend does not run on.
    """
    if backend not in ("auto", "host", "cuda"):
        raise ConfigError(f"backend={backend!r}: it must be 'auto', 'host' or 'cuda'")
    usable = torch.cuda.is_available() and _C.has_cuda
    wanted = _parsed(device)
    asked = f"backend={backend!r}" if device is None else f"backend={backend!r}, device={device!r}"
    if backend == "auto":
        # A rank that was given a GPU must not go on without it.
        named = wanted is not None and wanted.type == "cuda"
        backend = "cuda" if usable or named else "host"
        log.info(
            "backend auto: %s (GPU visible to torch: %s, native module built with CUDA: %s)",
            backend,
            torch.cuda.is_available(),
            _C.has_cuda,
        )
    if backend == "host":
        if wanted is not None and wanted.type != "cpu":
            raise ConfigError(
                f"device={device!r} with backend='host': its ranks run on the CPU; leave the device"
                " out, or use backend='cuda'"
            )
        return torch.device("cpu")
    if not usable:
        lack = (
            "this build of ep_runtime holds the host backend alone; build it again with nvcc on"
            " the PATH or in CUDA_HOME"
            if not _C.has_cuda
            else "torch sees no GPU; check the driver and CUDA_VISIBLE_DEVICES"
        )
        alone = "" if device is None else " without a device"
        raise BuildError(f"{asked}: {lack}, or use backend='host'{alone}")
    if wanted is None:
        return torch.device("cuda", torch.cuda.current_device())
    if wanted.type != "cuda":
        raise ConfigError(f"device={device!r} with backend='cuda': give a CUDA device")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r}: this process sees {torch.cuda.device_count()} GPUs; use an index"
            " below that"
        )
    return torch.device("cuda", index)


def _parsed(device: torch.device | int | str | None) -> torch.device | None:
    """A number is a GPU's, whatever torch's current accelerator is."""
    if device is None:
        return None
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={device!r}: it must be a torch.device, its name, a GPU's index or None"
        ) from error


def connect(config: EpConfig, world: World, device: torch.device) -> RankMemory:
    """Compare configurations, then get this rank's memory. Collective; raises on every rank."""
    trouble, wanted = "", "auto"
    try:
        config.validate_for(world.num_ranks)
        wanted = env.read().memory
    except ConfigError as error:
        trouble = str(error)
    fields = config.fields(world.num_ranks)
    fingerprint = config.fingerprint(world.num_ranks).hex()
    kind = agree_on(fields, fingerprint, trouble, world, device, wanted).kind
    sizes = layout_of(config, world.num_ranks).sizes
    return provide(kind, sizes, world, device)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the ranks found out together.

    kind        of memory: "shm", "ipc" or "nvshmem"
    neighbours  ranks on this rank's GPU, itself included (1 on the host)
    """

    kind: str
    neighbours: int


def provide(kind: str, sizes: MemorySizes, world: World, device: torch.device) -> RankMemory:
    """This rank's memory, of the kind that all agreed on. Collective; raises on every rank."""
    if kind == "shm":
        memory = host_memory(world, sizes)
    elif kind == "nvshmem":
        memory = nvshmem_memory(world, sizes, device.index)
    else:
        memory = ipc_memory(world, sizes, device.index)
    log.info("rank %d of %d: memory %s on %s", world.rank, world.num_ranks, kind, device)
    return memory


def agree_on(
    fields: dict[str, object],
    fingerprint: str,
    trouble: str,
    world: World,
    device: torch.device,
    memory: str,
    *,
    one_host: bool = True,
) -> Agreement:
    """Raise on every rank unless all ranks bring the same. Collective.

    fields       what the ranks must share, by name
    fingerprint  differs where a package of the same version was built differently
    trouble      what this rank knows to be wrong: every rank raises it
    memory       the kind that GPU ranks ask for: "auto", "ipc" or "nvshmem"
    one_host     all ranks must be able to share memory
    """
    wanted = memory if device.type == "cuda" else "shm"
    card = {
        "fields": {
            **fields,
            "backend": device.type,
            "memory": wanted,
            "host": host_id() if one_host else "",
        },
        "fingerprint": fingerprint,
        "trouble": trouble,
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if wanted != "shm" else "",
        "nvshmem": wanted == "auto" and nvshmem_available(),
    }
    cards = [json.loads(text) for text in world.all_gather(json.dumps(card).encode())]
    for rank, other in enumerate(cards):
        if other["trouble"]:
            raise ConfigError(
                other["trouble"] if rank == world.rank else f"rank {rank}: {other['trouble']}"
            )
    _raise_differences([c["fields"] for c in cards], [c["fingerprint"] for c in cards])
    neighbours = sum(c["gpu"] == card["gpu"] for c in cards) if wanted != "shm" else 1
    return Agreement(_kind(wanted, cards), neighbours)


def _kind(wanted: str, cards: list[dict[str, object]]) -> str:
    if wanted == "shm":
        return wanted
    gpus = [card["gpu"] for card in cards]
    if len(set(gpus)) < len(gpus):
        log.warning(
            "ranks share a GPU (%s): without MPS every hand-off between them costs a time slice;"
            " call torch.cuda.set_device(local_rank) first, or use virtual_ranks()",
            gpus,
        )
    if wanted != "auto":
        return wanted
    if all(card["nvshmem"] for card in cards):
        load_nvshmem()
        log.info("EP_MEMORY=auto: nvshmem, the extension loads on every rank")
        return "nvshmem"
    lacking = [rank for rank, card in enumerate(cards) if not card["nvshmem"]]
    log.info("EP_MEMORY=auto: CUDA IPC, no NVSHMEM extension on ranks %s", lacking)
    return "ipc"


def _raise_differences(fields: list[dict[str, object]], fingerprints: list[str]) -> None:
    """Name the ranks and fields that differ from what most ranks (or else rank 0) brought."""
    keys = [json.dumps([f, p], sort_keys=True) for f, p in zip(fields, fingerprints, strict=True)]
    usual, _ = Counter(keys).most_common(1)[0]
    if all(key == usual for key in keys):
        return
    base = fields[keys.index(usual)]
    agreeing = [rank for rank, key in enumerate(keys) if key == usual]
    parts = []
    for rank, own in enumerate(fields):
        if keys[rank] == usual:
            continue
        names = [n for n in base.keys() | own.keys() if base.get(n) != own.get(n)]
        told = ", ".join(f"{n}={own.get(n)!r} (not {base.get(n)!r})" for n in sorted(names))
        parts.append(f"rank {rank} has {told or 'another build of ep_runtime'}")
    raise ConfigError(
        f"ranks do not agree: {'; '.join(parts)}; ranks {agreeing} agree with each other; give"
        " every rank the same configuration, package and environment, on one host"
    )


def host_id() -> str:
    """The same on processes that can share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
