"""More ranks than GPUs: where they go, the MPS daemon they need, and a barrier without NCCL.

Ranks that share a GPU exchange rows through its memory: no link is measured, and the times are good
for comparing versions of the kernels on the same GPU, for nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from ep_runtime import env
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.buffer import Buffer
from ep_runtime.config import EpConfig
from ep_runtime.env import Env
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.memory.base import log
from ep_runtime.world import World

CONTROL = "nvidia-cuda-mps-control"
CONTROL_TIMEOUT_S = 20.0
HOST_RANKS = 2
SHARED_RANKS = 2  # where there is one GPU and nobody says how many ranks
MOST_SHARING = 32  # ranks in all: a token of the barrier below names an expert on each


@dataclass(frozen=True, slots=True)
class Plan:
    """Where ranks go. ranks_per_gpu: 1 where none share; one_gpu: all of them on the first GPU."""

    num_ranks: int
    ranks_per_gpu: int = 1
    one_gpu: bool = False


def plan_ranks(options: LowLatencyOptions, settings: Env, *, cuda: bool, num_gpus: int) -> Plan:
    """One rank per GPU; more ranks than GPUs, or `share_gpu`, share them.

    Raises ConfigError for `share_gpu` without GPUs or under torchrun, whose ranks are there before
    an MPS daemon could be.
    """
    asked = options.ranks or settings.world_size
    if not cuda:
        if options.share_gpu:
            raise ConfigError(
                "share_gpu=True with backend=host: CPU ranks have no GPU; leave out one"
            )
        return Plan(asked or HOST_RANKS)
    if settings.under_torchrun:
        if options.share_gpu:
            raise ConfigError(
                "share_gpu=True under torchrun: the ranks' MPS daemon must run before they do;"
                " start the benchmark without torchrun"
            )
        return Plan(asked or num_gpus)
    num_ranks = asked or (num_gpus if num_gpus > 1 and not options.share_gpu else SHARED_RANKS)
    per_gpu = num_ranks if options.share_gpu else -(-num_ranks // num_gpus)
    if per_gpu > 1 and num_ranks > MOST_SHARING:
        raise ConfigError(
            f"ranks={num_ranks} on {num_gpus} GPUs: at most {MOST_SHARING} ranks may share GPUs;"
            " lower ranks"
        )
    return Plan(num_ranks, per_gpu, one_gpu=options.share_gpu)


@contextmanager
def gpus_for(plan: Plan) -> Iterator[None]:
    """The environment of ranks started inside. Ranks that share a GPU get an MPS daemon (of this
    process's own, unless CUDA_MPS_PIPE_DIRECTORY names one) and an equal share of its SMs each.

    Raises BuildError where there is no MPS.
    """
    if plan.ranks_per_gpu < 2:
        yield
        return
    shared = {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // plan.ranks_per_gpu),
        env.variable("memory"): "ipc",  # NVSHMEM wants a GPU for each rank
    }
    if env.read().cuda_mps_pipe_directory:
        with env.defaults(shared):
            yield
        return
    with tempfile.TemporaryDirectory(prefix="ep-mps-", ignore_cleanup_errors=True) as place:
        shared |= {"CUDA_MPS_PIPE_DIRECTORY": place, "CUDA_MPS_LOG_DIRECTORY": place}
        with env.defaults(shared):
            _control("-d")
            try:
                yield
            finally:
                _stop()


def _control(*arguments: str, say: str | None = None) -> None:
    if shutil.which(CONTROL) is None:
        raise BuildError(
            f"ranks that share a GPU need MPS, and {CONTROL} is not on the PATH; install it (it"
            " comes with the driver), or start no more ranks than GPUs"
        )
    try:
        subprocess.run(
            [CONTROL, *arguments],
            input=say,
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=CONTROL_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"{CONTROL} failed ({error}); ranks that share a GPU need MPS: end other daemons, or"
            " start no more ranks than GPUs"
        ) from error


def _stop() -> None:
    """Ask the daemon to end. What the run found matters more than a daemon that stays."""
    try:
        _control(say="quit\n")
    except BuildError as error:
        log.warning("the MPS daemon of this run may still be there: %s", error)


def count_sharing(gathered: list[str]) -> int:
    """The most ranks that have the same GPU, from every rank's identifier of its own."""
    return max(gathered.count(one) for one in gathered)


@contextmanager
def pair_barrier(
    store: Store, rank: int, num_ranks: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """What queues a barrier of all ranks on the current stream, without NCCL. Collective.

    A token goes to an expert on every rank and comes back: combine ends when all have answered, and
    a rank answers when it has come to its own dispatch.
    """
    config = EpConfig(
        num_experts=num_ranks,
        topk=num_ranks,
        hidden=128,
        max_tokens=1,
        num_chains=1,
        dispatch_format="bf16",
        recv_format="compact",
    )
    with Buffer(config, World.from_store(store, rank, num_ranks), "cuda", device=device) as buffer:
        x, y, out = (
            torch.zeros(rows, config.hidden, dtype=torch.bfloat16, device=device)
            for rows in (1, num_ranks, 1)
        )
        experts = torch.arange(num_ranks, device=device).unsqueeze(0)
        weights = torch.ones(1, num_ranks, device=device)

        def align() -> None:
            received = buffer.dispatch_fused(x, experts, weights)
            buffer.combine_fused(y, received.handle, out=out)

        align()
        torch.cuda.synchronize(device)
        yield align
