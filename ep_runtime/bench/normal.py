"""`ep-runtime bench normal`: dispatch and combine at prefill sizes, checked, then timed.

records = run(NormalOptions(tokens=(4096,)))      # starts the ranks, or joins torchrun's
status = main(options)                            # the same with table, JSON and plot
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from rich.console import Console

from ep_runtime import env
from ep_runtime.bench import normal_report
from ep_runtime.bench.clock import Body, Clock, HostClock
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_ours import OPS, OurNormal, repeated
from ep_runtime.bench.normal_peers import Peer, deep_ep_peer, nccl_peer
from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.bench.normal_records import NormalRecord, write_normal_records
from ep_runtime.bench.out import is_first, make_folder
from ep_runtime.bench.records import Status
from ep_runtime.bench.report import wide_console
from ep_runtime.bench.routing import Sizes
from ep_runtime.bench.session import Session, open_session
from ep_runtime.bench.sharing import gpus_for, plan_ranks
from ep_runtime.bench.stats import slowest_rank
from ep_runtime.bench.team import StageError
from ep_runtime.connect import choose_device
from ep_runtime.launch import launch
from ep_runtime.normal import NormalBuffer
from ep_runtime.world import World

__all__ = ["NormalOptions", "main", "run"]

DEEP_EP_SMS = (24, 64)


def main(options: NormalOptions, console: Console | None = None) -> int:
    """Run, then (on rank 0) print the table and write JSON and plot. Returns the exit status.

    1 if anything was wrong or failed; a peer that is absent is no failure.
    """
    records = run(options)
    if is_first():
        normal_report.publish(records, options, console or wide_console())
    return int(any(record.status in ("wrong", "failed") for record in records))


def run(options: NormalOptions) -> list[NormalRecord]:
    """Measure on every rank (started here, or this process's under torchrun); the same records
    everywhere. Raises BuildError or ConfigError for what this machine cannot run."""
    make_folder(options.out)
    cuda = choose_device(options.backend, None).type == "cuda"
    gpus = torch.cuda.device_count()
    plan = plan_ranks(options.session(), env.read(), cuda=cuda, num_gpus=gpus)
    options = replace(options, backend="cuda" if cuda else "host", ranks=plan.num_ranks)
    with gpus_for(plan):
        spread = cuda and not plan.one_gpu
        return launch(measure, plan.num_ranks, options, gpu_per_rank=spread)[0]


def measure(world: World, options: NormalOptions) -> list[NormalRecord]:
    """One rank's part. Collective."""
    with open_session(world, options.session()) as session:
        bench = _Bench(session, options)
        for tokens in options.tokens:
            bench.size(tokens)
        return bench.records


class _Bench:
    """Goes through the cases of a run; a failure becomes a record."""

    def __init__(self, session: Session, options: NormalOptions) -> None:
        self.records: list[NormalRecord] = []
        self._session = session
        self._options = options
        self._team = session.team
        self._host_clock = HostClock(self._team.meet)

    def size(self, tokens: int) -> None:
        """Every format, ours before the peers'."""
        options, session = self._options, self._session
        sizes = Sizes(
            num_ranks=self._team.num_ranks,
            num_tokens=tokens,
            hidden=options.hidden,
            topk=options.topk,
            num_experts=options.num_experts,
            skew=options.skew,
            seed=options.seed,
        )
        world = World.from_store(session.store, self._team.rank, self._team.num_ranks)
        buffer = NormalBuffer(
            world,
            max_tokens=tokens,
            max_hidden=options.hidden,
            max_experts=options.num_experts,
            max_topk=options.topk,
            backend=options.backend,
        )
        for dispatch_format in options.formats:
            problem = self._team.stage(
                "drawing inputs",
                lambda fmt=dispatch_format: NormalProblem.make(  # type: ignore[misc]
                    sizes, self._team.rank, fmt, session.device
                ),
            )
            self._ours(buffer, problem)
            self._peers(problem)
        self._team.stage("closing", buffer.close)

    def _ours(self, buffer: NormalBuffer, problem: NormalProblem) -> None:
        ours = OurNormal(buffer, problem)
        limits = dict.fromkeys(min(n or buffer.max_sms, buffer.max_sms) for n in self._options.sms)
        on_gpu = self._session.device.type == "cuda"
        timings = self._options.timings if on_gpu else ("eager",)
        for sms, timing in product(limits, timings):
            exact = timing == "eager"
            blank = self._blank("ep_runtime", timing, sms, problem)
            try:
                if self._wrong(blank, lambda: ours.check(sms, exact=exact)):  # noqa: B023
                    continue
                for op in OPS:
                    body = self._team.stage(
                        "preparing",
                        lambda: ours.body(op, sms, self._options.repeats, exact=exact),  # noqa: B023
                    )
                    self._time(replace(blank, op=op), body, problem)
                self._team.stage("settling", buffer.check)
            except StageError as failure:
                self._keep(replace(blank, status="failed", reason=str(failure)))

    def _peers(self, problem: NormalProblem) -> None:
        session, options = self._session, self._options
        on_gpu = session.device.type == "cuda"
        found: list[tuple[str, int, Callable[[], Peer]]] = []
        if options.wants("nccl-ag-rs"):
            name = "nccl-ag-rs" if on_gpu else "gloo-ag-rs"
            found.append((name, 0, lambda: nccl_peer(session, problem)))
        if options.wants("deep_ep"):
            found += [
                ("deep_ep", sms, lambda n=sms: deep_ep_peer(session, problem, n))  # type: ignore[misc]
                for sms in DEEP_EP_SMS
            ]
        for name, sms, build in found:
            blank = self._blank(name, "graph" if on_gpu else "eager", sms, problem)
            if session.shares_gpus or (name == "deep_ep" and not on_gpu):
                self._keep(replace(blank, status="absent", reason="it needs one GPU per rank"))
            else:
                self._peer(blank, build, problem)

    def _peer(self, blank: NormalRecord, build: Callable[[], Peer], problem: NormalProblem) -> None:
        """One peer: built, checked, timed."""
        try:
            peer = self._team.stage("build", build)
            if self._wrong(blank, peer.check):
                return
            for op, once in peer.runs.items():
                self._team.stage("first run", once)
                self._time(replace(blank, op=op), repeated(once, self._options.repeats), problem)
        except StageError as failure:
            status: Status = "absent" if "cannot be imported" in str(failure) else "failed"
            self._keep(replace(blank, status=status, reason=str(failure)))

    def _wrong(self, blank: NormalRecord, check: Callable[[], str]) -> bool:
        """Has any rank found something wrong? Then that is recorded, and nothing is to be timed."""
        told = self._team.gather(self._team.stage("check", check))
        reasons = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
        if reasons:
            self._keep(replace(blank, status="wrong", reason="; ".join(reasons)))
        return bool(reasons)

    def _time(self, blank: NormalRecord, body: Body, problem: NormalProblem) -> None:
        on_gpu = self._session.device.type == "cuda"
        eager = blank.timing == "eager" or not on_gpu
        clock: Clock = self._host_clock if eager else self._session.clock

        def settled(mark: Callable[[str], None]) -> None:
            body(mark)
            if on_gpu and eager:
                torch.cuda.synchronize()

        def timed() -> list[float]:
            return clock.periods(settled if eager else body, self._options.replays)

        own = [time / self._options.repeats for time in self._team.stage("timing", timed)]
        times = slowest_rank(self._team.gather(own))
        self._keep(
            replace(
                blank,
                timing="eager" if eager else "graph",
                recv_bytes=problem.recv_bytes(blank.op),
                link_bytes=problem.link_bytes(blank.op),
                median_us=times.median_us,
                min_us=times.min_us,
                max_us=times.max_us,
            )
        )

    def _blank(self, impl: str, timing: str, num_sms: int, problem: NormalProblem) -> NormalRecord:
        """A pair without a time: what stays the same in all records of an implementation."""
        sizes, session = problem.sizes, self._session
        return NormalRecord(
            machine=session.machine,
            impl=impl,
            op="pair",
            timing=timing,
            dispatch_format=problem.dispatch_format,
            num_sms=num_sms,
            num_ranks=sizes.num_ranks,
            ranks_per_gpu=session.ranks_per_gpu,
            num_tokens=sizes.num_tokens,
            hidden=sizes.hidden,
            topk=sizes.topk,
            num_experts=sizes.num_experts,
            skew=sizes.skew,
            repeats=self._options.repeats,
            replays=self._options.replays,
            recv_bytes=0.0,
            link_bytes=0.0,
            link_gbs=session.link_gbs,
        )

    def _keep(self, record: NormalRecord) -> None:
        self.records.append(record)
        if self._team.rank:
            return
        print(normal_report.line(record), file=sys.stderr, flush=True)
        if self._options.out is not None:
            path = normal_report.result_path(self._options.out, self.records, self._options.label)
            write_normal_records(path, self.records)
