"""`ep-runtime bench low-latency`: dispatch and combine at decode sizes, checked, then timed.

records = run(LowLatencyOptions(tokens=(1, 128)))      # starts the ranks, or joins torchrun's
status = main(options)                                 # the same with table, JSON and plot
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import torch
from rich.console import Console

from ep_runtime import env
from ep_runtime.bench import report
from ep_runtime.bench.candidates import Candidate, our_candidates, peer_candidates
from ep_runtime.bench.implementation import Problem
from ep_runtime.bench.measure import absence, measure_case
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.ours import Buffers
from ep_runtime.bench.out import is_first, make_folder
from ep_runtime.bench.peers.find import find_peers
from ep_runtime.bench.records import Record, write_records
from ep_runtime.bench.routing import Sizes
from ep_runtime.bench.session import Session, open_session
from ep_runtime.bench.sharing import gpus_for, plan_ranks
from ep_runtime.connect import choose_device
from ep_runtime.launch import launch
from ep_runtime.world import World

__all__ = ["LowLatencyOptions", "Record", "main", "run"]


def main(options: LowLatencyOptions, console: Console | None = None) -> int:
    """Run, then (on rank 0) print tables and write JSON and plot. Returns the exit status.

    1 if anything was wrong or failed; a peer that is absent is no failure.
    """
    records = run(options)
    if is_first():
        report.publish(records, options, console or report.wide_console())
    return int(any(record.status in ("wrong", "failed") for record in records))


def run(options: LowLatencyOptions) -> list[Record]:
    """Measure on every rank (started here, or this process's under torchrun); the same records
    everywhere. Raises BuildError for a backend, or for a way to share GPUs, that this machine
    lacks, and ConfigError for ranks that it cannot place or results that it cannot write."""
    make_folder(options.out)
    cuda = choose_device(options.backend, None).type == "cuda"
    plan = plan_ranks(options, env.read(), cuda=cuda, num_gpus=torch.cuda.device_count())
    options = replace(options, backend="cuda" if cuda else "host", ranks=plan.num_ranks)
    with gpus_for(plan):
        spread = cuda and not plan.one_gpu
        return launch(measure, plan.num_ranks, options, gpu_per_rank=spread)[0]


def measure(world: World, options: LowLatencyOptions) -> list[Record]:
    """One rank's part: every case of the options, ours before the peers'. Collective."""
    with open_session(world, options) as session:
        records: list[Record] = []
        team = session.team
        buffers = Buffers(session.store, team.rank, team.num_ranks, session.device)
        _measure_all(session, our_candidates(session, buffers), records)
        team.stage("closing", buffers.close)
        found = team.stage("looking for peers", lambda: find_peers(session))
        _measure_all(session, peer_candidates(found.peers), records)
        records += [absence(session, absent) for absent in found.absent]
        _keep(session, records)
        team.stage("closing", found.close)
        return records


def _measure_all(session: Session, candidates: list[Candidate], records: list[Record]) -> None:
    options = session.options
    for num_experts, wire in product(options.experts, options.dispatch_formats):
        problems = [_problem(session, num_experts, wire, tokens) for tokens in options.tokens]
        for candidate, problem in product(candidates, problems):
            measured = measure_case(session, candidate, problem)
            records += measured
            _keep(session, records)
            if session.team.rank == 0:
                print(report.line(measured[0]), file=sys.stderr, flush=True)


def _problem(session: Session, num_experts: int, wire: str, tokens: int) -> Problem:
    options, team = session.options, session.team
    sizes = Sizes(
        num_ranks=team.num_ranks,
        num_tokens=tokens,
        hidden=options.hidden,
        topk=options.topk,
        num_experts=num_experts,
        skew=options.skew,
        seed=options.seed,
    )
    return Problem.make(
        sizes, team.rank, options.buffer_tokens, wire, options.input_sets, session.device
    )


def _keep(session: Session, records: list[Record]) -> None:
    """Write what there is, so that a run that is cut short leaves its results."""
    options = session.options
    if session.team.rank == 0 and options.out is not None and records:
        write_records(report.result_path(options.out, records, options.label), records)
