"""One case: build, check, then time the pair and its parts. Any failure becomes a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ep_runtime.bench.candidates import Candidate
from ep_runtime.bench.implementation import (
    Implementation,
    Problem,
    chain,
    chain_of_parts,
    check,
    check_after_timing,
    poison,
)
from ep_runtime.bench.ours import OurBuffer
from ep_runtime.bench.peers import Absent
from ep_runtime.bench.records import Case, Record, Status
from ep_runtime.bench.session import Session
from ep_runtime.bench.stats import Summary, slowest_rank
from ep_runtime.bench.team import StageError
from ep_runtime.bench.traffic import Traffic, time_at

UNKNOWN_ERROR = 1e30  # stands for NaN and infinity, which JSON does not have


def measure_case(session: Session, candidate: Candidate, problem: Problem) -> list[Record]:
    """The records of one candidate on one problem, the pair's (or the reason for none) first."""
    case = _case(session, candidate, problem)
    team, clock = session.team, session.clock
    try:
        implementation = team.stage("build", lambda: candidate.build(problem))
        verdict = team.stage("check", lambda: check(implementation, problem, clock))
        verdicts = team.gather([min(verdict.error, UNKNOWN_ERROR), verdict.reason])
        error = max(error for error, _ in verdicts)
        wrong = _by_rank([text for _, text in verdicts])
        least = problem.traffic(candidate.combine_format)
        timer = _Timer(session, case, problem, implementation, least, error)
        if not wrong:
            records, reason = team.stage("time the pair", timer.pair)
            wrong = _by_rank(team.gather(reason))
        if wrong:
            candidate.drop()
            return [_without_time(session, case, "wrong", wrong, error)]
    except StageError as failure:
        candidate.drop()
        return [_without_time(session, case, "failed", str(failure), None)]
    if not session.options.parts:
        return records
    try:
        return records + team.stage("time the parts", timer.parts)
    except StageError as failure:
        candidate.drop()
        return [*records, _without_time(session, case, "failed", str(failure), error, op="parts")]


def _by_rank(reasons: Sequence[str]) -> str:
    """What ranks have to say, or "" if none has anything."""
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)


def absence(session: Session, absent: Absent) -> Record:
    """A record that says which peer is not here, at the first size of the options."""
    options = session.options
    case = Case(
        impl=absent.name,
        mode="",
        num_ranks=session.team.num_ranks,
        ranks_per_gpu=session.ranks_per_gpu,
        num_tokens=options.tokens[0],
        hidden=options.hidden,
        topk=options.topk,
        num_experts=options.experts[0],
        max_tokens=options.buffer_tokens,
        dispatch_format=options.dispatch_formats[0],
        recv_format="",
        num_sms=0,
        skew=options.skew,
        pairs=options.pairs,
        replays=options.replays,
    )
    return _without_time(session, case, "absent", absent.reason, None)


def _case(session: Session, candidate: Candidate, problem: Problem) -> Case:
    options, sizes = session.options, problem.sizes
    return Case(
        impl=candidate.name,
        mode=candidate.mode,
        num_ranks=sizes.num_ranks,
        ranks_per_gpu=session.ranks_per_gpu,
        num_tokens=sizes.num_tokens,
        hidden=sizes.hidden,
        topk=sizes.topk,
        num_experts=sizes.num_experts,
        max_tokens=problem.max_tokens,
        dispatch_format=problem.dispatch_format,
        recv_format=candidate.recv_format,
        num_sms=candidate.num_sms,
        skew=sizes.skew,
        pairs=options.pairs,
        replays=options.replays,
    )


def _without_time(
    session: Session,
    case: Case,
    status: Status,
    reason: str,
    error: float | None,
    op: str = "pair",
) -> Record:
    known = None if error is None or error >= UNKNOWN_ERROR else error
    return Record.without_time(case, session.machine, op, status, reason, known)


@dataclass(frozen=True, slots=True)
class _Timer:
    session: Session
    case: Case
    problem: Problem
    implementation: Implementation
    least: Traffic
    error: float

    def pair(self) -> tuple[list[Record], str]:
        """The period of the chain, in mode "hook" without the other work in it; and what is wrong
        with the output that it left."""
        pairs, replays = self.case.pairs, self.case.replays
        clock = self.session.clock
        poison(self.implementation, 0)
        body = chain(self.implementation, pairs, len(self.problem.inputs))
        times = self._summary(clock.periods(body, replays))
        self.implementation.settle()
        reason = check_after_timing(self.implementation, self.problem)
        compute_us = None
        if self.case.mode == "hook" and isinstance(self.implementation, OurBuffer):
            alone = clock.periods(self.implementation.compute_alone(pairs), replays)
            compute_us = self._summary(alone).median_us
            times = times.minus(compute_us)
        return [self._record("pair", clock.timing, times, compute_us)], reason

    def parts(self) -> list[Record]:
        """dispatch and combine apart (not in "hook", with other work in them); then each launch."""
        sets, clock = len(self.problem.inputs), self.session.clock
        sections: dict[str, list[float]] = {}
        if self.case.mode != "hook":
            body = chain(self.implementation, self.case.pairs, sets)
            sections = clock.sections(body, self.case.replays)
        if any(step.part for step in self.implementation.steps(0)):
            body = chain_of_parts(self.implementation, self.case.pairs, sets)
            parts = clock.sections(body, self.case.replays)
            sections |= {name: times for name, times in parts.items() if name not in sections}
        self.implementation.settle()
        return [
            self._record(name, clock.section_timing, self._summary(times), None)
            for name, times in sections.items()
        ]

    def _summary(self, own_times: Sequence[float]) -> Summary:
        """Microseconds per pair, over all ranks."""
        per_pair = [time / self.case.pairs for time in own_times]
        return slowest_rank(self.session.team.gather(per_pair))

    def _record(self, op: str, timing: str, times: Summary, compute_us: float | None) -> Record:
        extra: dict[str, Any] = {}
        if op in ("pair", "dispatch", "combine"):
            extra["link_bytes"] = self.least.of(op)
            wire = self.implementation.wire_bytes
            extra["wire_bytes"] = None if wire is None else wire.of(op)
            rate = self.session.link_gbs
            extra["link_gbs"] = rate
            extra["floor_us"] = None if rate is None else time_at(extra["link_bytes"], rate)
        return Record.timed(
            self.case,
            self.session.machine,
            op,
            times,
            timing=timing,
            error=self.error,
            compute_us=compute_us,
            heap_bytes=self.implementation.heap_bytes,
            **extra,
        )
