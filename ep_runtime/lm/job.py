"""Decoding as a job for a launcher: what one process of the group does, from World to report."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ep_runtime.buffer import Buffer
from ep_runtime.config import DispatchFormat, EpConfig
from ep_runtime.connect import Backend
from ep_runtime.errors import ConfigError
from ep_runtime.lm import checkpoint
from ep_runtime.lm.check import GREEDY, TOLERANCE, Sampling, check_against_reference
from ep_runtime.lm.checkpoint import Checkpoint
from ep_runtime.lm.decode import Decoder, DecodeReport
from ep_runtime.lm.parallel import ep_config
from ep_runtime.lm.schedule import check_lengths
from ep_runtime.world import World


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """The same on every rank, and picklable.

    checkpoint    None: the one that ships with the package
    num_tokens    bytes to decode after each prompt
    batch         sequences that a rank decodes at once; more wait for a free row
    eager         run the step without its graph
    check         compare every token with the single-rank reference
    tolerance     for the check; None: TOLERANCE of the dispatch format
    keep_logits   bring the logits to the host with every token, as a check does
    stream        the rank of prompt 0 writes it to standard output while it is decoded
    """

    prompts: tuple[bytes, ...]
    num_tokens: int = 128
    batch: int = 8
    microbatches: int = 1
    dispatch_format: DispatchFormat = "bf16"
    backend: Backend = "auto"
    checkpoint: Path | None = None
    sampling: Sampling = GREEDY
    eager: bool = False
    check: bool = False
    tolerance: float | None = None
    keep_logits: bool = False
    stream: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "microbatches", "num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be at least 1")


def decode_rank(world: World, job: DecodeJob) -> DecodeReport:
    """This rank's part; collective. `merge_reports` joins what the ranks return.

    Raises CheckpointError, ConfigError or ShapeError on every rank before anything is launched,
    also where ranks were given different jobs or checkpoints, and PeerTimeout where a rank is lost.
    """
    weights, config = world.agree("preparing to decode", lambda: _prepare(job))
    _require_same(world, weights, job)
    with Buffer(config, world, backend=job.backend) as buffer:
        decoder = Decoder(weights, [buffer], job.microbatches)
        report = decoder.run(
            job.prompts,
            job.num_tokens,
            job.sampling,
            eager=job.eager,
            keep_logits=job.check or job.keep_logits,
            on_token=_print_first if job.stream and world.rank == 0 else None,
        )
    if job.check:
        tolerance = TOLERANCE[job.dispatch_format] if job.tolerance is None else job.tolerance
        checked = check_against_reference(weights, report.sequences, job.sampling, tolerance)
        report = replace(report, check=checked)
    return report.without_logits()


def _prepare(job: DecodeJob) -> tuple[Checkpoint, EpConfig]:
    weights = checkpoint.load(job.checkpoint)
    check_lengths(job.prompts, job.num_tokens, weights.config.max_context)
    config = ep_config(
        weights.config,
        job.batch,
        microbatches=job.microbatches,
        dispatch_format=job.dispatch_format,
    )
    return weights, config


def _require_same(world: World, weights: Checkpoint, job: DecodeJob) -> None:
    """Ranks with other prompts would run other numbers of steps, with other weights write nonsense.

    Raises ConfigError on every rank, naming one that differs from rank 0.
    """
    told = repr(replace(job, checkpoint=None, stream=False)).encode()
    digests = {
        "job (prompts and options)": hashlib.sha256(told).digest(),
        "checkpoint": weights.fingerprint(),
    }
    for what, mine in digests.items():
        everyone = world.all_gather(mine)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise ConfigError(
                    f"rank {rank} was given another {what} than rank 0: sha256 "
                    f"{theirs.hex()[:12]}, not {everyone[0].hex()[:12]}; give all ranks the same"
                )


def _print_first(index: int, token: int) -> None:
    if index == 0:
        sys.stdout.buffer.write(bytes((token,)))
        sys.stdout.flush()
