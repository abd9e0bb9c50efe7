"""Decoding as a job for a launcher: what one process of the group does, from World to report."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ep_runtime.buffer import Buffer
from ep_runtime.config import DispatchFormat
from ep_runtime.connect import Backend
from ep_runtime.lm import checkpoint
from ep_runtime.lm.check import GREEDY, TOLERANCE, Sampling, check_against_reference
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
    stream: bool = False


def decode_rank(world: World, job: DecodeJob) -> DecodeReport:
    """This rank's part; collective. `merge_reports` joins what the ranks return.

    Raises CheckpointError, ConfigError or ShapeError on every rank before anything is launched,
    and PeerTimeout where a rank is lost.
    """
    weights = checkpoint.load(job.checkpoint)
    check_lengths(job.prompts, job.num_tokens, weights.config.max_context)
    config = ep_config(
        weights.config,
        job.batch,
        microbatches=job.microbatches,
        dispatch_format=job.dispatch_format,
    )
    with Buffer(config, world, backend=job.backend) as buffer:
        decoder = Decoder(weights, [buffer], job.microbatches)
        report = decoder.run(
            job.prompts,
            job.num_tokens,
            job.sampling,
            eager=job.eager,
            keep_logits=job.check,
            on_token=_print_first if job.stream and world.rank == 0 else None,
        )
    if job.check:
        tolerance = TOLERANCE[job.dispatch_format] if job.tolerance is None else job.tolerance
        checked = check_against_reference(weights, report.sequences, job.sampling, tolerance)
        report = replace(report, check=checked)
    return report.without_logits()


def _print_first(index: int, token: int) -> None:
    if index == 0:
        sys.stdout.buffer.write(bytes((token,)))
        sys.stdout.flush()
