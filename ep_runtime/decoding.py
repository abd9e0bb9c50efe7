"""The main job: a language model decodes text over ranks that are started here (or by torchrun)."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ep_runtime import env
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.launch import launch
from ep_runtime.lm import checkpoint as checkpoints
from ep_runtime.lm.check import TOLERANCE, check_against_reference
from ep_runtime.lm.decode import Decoder, DecodeReport, merge_reports
from ep_runtime.lm.job import DecodeJob, decode_rank
from ep_runtime.lm.parallel import ep_config
from ep_runtime.lm.schedule import check_lengths
from ep_runtime.native import _C
from ep_runtime.virtual import virtual_ranks
from ep_runtime.world import World

Choice = Literal["auto", "host", "cuda", "virtual"]
CPU_RANKS = 4  # where the user names no number

DEFAULT_PROMPTS = (
    "It is a truth universally acknowledged, that ",
    "In the beginning ",
    "The database ",
    "She could not help ",
    "A function that ",
    "And the king said unto ",
    "If the table ",
    "The morning was ",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the ranks run: processes on the CPU, a process per GPU, or one process for all ranks
    on the GPUs. `reason` is for the reader."""

    kind: Literal["host", "cuda", "virtual"]
    num_ranks: int
    reason: str


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """The run from graphs and, where asked for, its repetition without them."""

    report: DecodeReport
    eager: DecodeReport | None


def make_plan(choice: str, ranks: int | None) -> Plan:
    """Decide the backend and the number of ranks (None: all GPUs, or 4 on the CPU).

    Raises ConfigError for a choice that cannot be, BuildError for one that this machine or build
    does not offer.
    """
    if choice not in get_args(Choice):
        raise ConfigError(f"backend={choice!r}: use one of {', '.join(get_args(Choice))}")
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ranks={ranks}: it must be at least 1")
    started = env.read().world_size if env.read().under_torchrun else None
    if started is not None and ranks not in (None, started):
        raise ConfigError(f"ranks={ranks}, but torchrun started {started}; leave --ranks out")
    wanted = started or ranks
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and _C.has_cuda else 0
    if choice == "host" or (choice == "auto" and gpus == 0):
        reason = "asked for" if choice == "host" else _why_no_gpu()
        return Plan("host", wanted or CPU_RANKS, f"processes over shared memory ({reason})")
    if gpus == 0:
        raise BuildError(f"backend={choice!r}: {_why_no_gpu()}; use --backend host")
    if started is not None:
        if choice == "virtual":
            raise ConfigError("virtual ranks share one process; start it without torchrun")
        return Plan("cuda", started, f"one process per GPU, started by torchrun ({gpus} GPUs here)")
    too_few = gpus < (wanted or 2)  # one GPU alone shows nothing of expert parallelism
    if choice == "virtual" or (choice == "auto" and too_few):
        reason = "asked for" if choice == "virtual" else f"{gpus} GPU here"
        return Plan("virtual", wanted or CPU_RANKS, f"ranks of one process ({reason})")
    return Plan("cuda", wanted or gpus, f"one process per GPU ({gpus} GPUs here)")


def _why_no_gpu() -> str:
    if not _C.has_cuda:
        return f"this build holds no CUDA backend: {_C.build_info}"
    return "no NVIDIA GPU that torch can see"


def decode(job: DecodeJob, plan: Plan, repeat_eagerly: bool = False) -> DecodeResult:
    """Run the job; with job.stream, prompt 0 and its text go to standard output as they come.

    repeat_eagerly: run all steps once more without graphs, for their time. Under torchrun every
    process calls this, and every process gets the whole report. Raises CheckpointError,
    ConfigError or ShapeError before any rank is started.
    """
    model = checkpoints.load(job.checkpoint).config
    check_lengths(job.prompts, job.num_tokens, model.max_context)
    _require_divisor(plan.num_ranks, model.num_experts)
    settings = env.read()
    if job.stream and not (settings.under_torchrun and settings.rank):
        sys.stdout.write(job.prompts[0].decode("utf-8", errors="replace"))
        sys.stdout.flush()
    if plan.kind == "virtual":
        result = _decode_virtual(job, plan.num_ranks, repeat_eagerly)
    else:
        job = replace(job, backend=plan.kind)
        on_gpus = plan.kind == "cuda"
        result = launch(_decode_rank, plan.num_ranks, job, repeat_eagerly, gpu_per_rank=on_gpus)[0]
    return result


def _require_divisor(num_ranks: int, num_experts: int) -> None:
    if num_experts % num_ranks == 0:
        return
    good = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
    raise ConfigError(
        f"ranks={num_ranks}: the model's {num_experts} experts cannot be shared out equally; use"
        f" one of {good}"
    )


def _decode_rank(world: World, job: DecodeJob, repeat_eagerly: bool) -> DecodeResult:
    """One process, one rank; every rank returns the report of all."""
    runs = [job, *([_eager(job)] if repeat_eagerly else [])]
    reports = []
    for run in runs:
        mine = pickle.dumps(decode_rank(world, run))
        reports.append(merge_reports([pickle.loads(part) for part in world.all_gather(mine)]))
    return DecodeResult(reports[0], reports[1] if repeat_eagerly else None)


def _eager(job: DecodeJob) -> DecodeJob:
    """The same work without graphs: also what a check brings to the host."""
    return replace(job, eager=True, check=False, keep_logits=job.check, stream=False)


def _decode_virtual(job: DecodeJob, num_ranks: int, repeat_eagerly: bool) -> DecodeResult:
    """All ranks in this process, spread over its GPUs."""
    checkpoint = checkpoints.load(job.checkpoint)
    config = ep_config(
        checkpoint.config,
        job.batch,
        microbatches=job.microbatches,
        dispatch_format=job.dispatch_format,
    )
    devices = list(range(min(torch.cuda.device_count(), num_ranks)))
    buffers = virtual_ranks(config, num_ranks, backend="cuda", devices=devices)
    try:
        decoder = Decoder(checkpoint, buffers, job.microbatches)
        run = (job.prompts, job.num_tokens, job.sampling)
        on_token = _write_first if job.stream else None
        report = decoder.run(*run, keep_logits=job.check, on_token=on_token)
        eager = decoder.run(*run, eager=True, keep_logits=job.check) if repeat_eagerly else None
    finally:
        for buffer in buffers:
            buffer.close()
    if job.check:
        tolerance = TOLERANCE[job.dispatch_format] if job.tolerance is None else job.tolerance
        check = check_against_reference(checkpoint, report.sequences, job.sampling, tolerance)
        report = replace(report, check=check)
    return DecodeResult(report.without_logits(), eager and eager.without_logits())


def _write_first(prompt_index: int, token: int) -> None:
    if prompt_index == 0:
        sys.stdout.buffer.write(bytes((token,)))
        sys.stdout.flush()
