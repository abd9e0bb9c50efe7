"""What the benchmark needs of our Buffer and of every peer, and the check that comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ep_runtime.bench.clock import Body, Clock, Mark
from ep_runtime.bench.experts import expected_output, relative_error
from ep_runtime.bench.routing import Inputs, Sizes, make_inputs
from ep_runtime.bench.traffic import Traffic, least_traffic, message_counts

FP8_ERROR_LIMIT = 6e-2  # e4m3 has a sixteenth between its numbers
ERROR_LIMIT = 1e-2  # two bf16 roundings are 0.4e-2; one wrong row of eight is 0.3


@dataclass(frozen=True, slots=True)
class Step:
    """One launch of a pair. op: "dispatch" or "combine"; part: "" or "send", "recv", ..."""

    op: str
    part: str
    run: Callable[[], None]

    @property
    def name(self) -> str:
        return f"{self.op}_{self.part}" if self.part else self.op


@dataclass(frozen=True, slots=True)
class Problem:
    """One size, with this rank's input sets on its device.

    max_tokens   M
    everyone     inputs of every rank, per set, on the CPU
    inputs       this rank's, one per set
    counts       [R, R] per set: tokens of rank s with an expert on rank d
    """

    sizes: Sizes
    rank: int
    max_tokens: int
    dispatch_format: str
    everyone: tuple[tuple[Inputs, ...], ...]
    inputs: tuple[Inputs, ...]
    counts: tuple[torch.Tensor, ...]
    device: torch.device

    @classmethod
    def make(
        cls,
        sizes: Sizes,
        rank: int,
        max_tokens: int,
        dispatch_format: str,
        num_sets: int,
        device: torch.device,
    ) -> Problem:
        """Draw the inputs of every rank and move this rank's to `device`."""
        everyone = tuple(
            tuple(make_inputs(sizes, other, index) for other in range(sizes.num_ranks))
            for index in range(num_sets)
        )
        counts = tuple(
            message_counts([one.topk_idx for one in ranks], sizes.num_experts) for ranks in everyone
        )
        inputs = tuple(ranks[rank].to(device) for ranks in everyone)
        return cls(sizes, rank, max_tokens, dispatch_format, everyone, inputs, counts, device)

    def traffic(self, combine_format: str = "bf16") -> Traffic:
        """The least that the link must carry, averaged over input sets."""
        formats = self.dispatch_format, combine_format
        return Traffic.mean(
            [least_traffic(counts, *formats, self.sizes.hidden) for counts in self.counts]
        )

    @property
    def num_local(self) -> int:
        """Experts of each rank."""
        return self.sizes.num_experts // self.sizes.num_ranks


class Implementation(Protocol):
    """dispatch and combine of one library on one problem.

    error_limit    the most that `relative_error` may be
    rows_stay      equal inputs put rows in equal places, so that what the experts wrote for an
                   input set is right whenever that set is dispatched again
    wire_bytes     what it sends itself, in the busier direction, or None
    heap_bytes     memory that it holds for the exchange on this rank, or None
    """

    error_limit: float
    rows_stay: bool
    wire_bytes: Traffic | None
    heap_bytes: int | None

    def steps(self, index: int) -> Sequence[Step]:
        """The launches of one pair on input set `index`, in order. Capturable."""
        ...

    def apply_experts(self, index: int, /) -> None:
        """Fill the combine's input from what the dispatch delivered, with `experts.gains`."""
        ...

    def output(self, index: int) -> torch.Tensor:
        """The tensor [T, H] that the last combine on `index` wrote."""
        ...

    def settle(self) -> None:
        """Wait for the device and raise what it recorded."""
        ...

    def check_dispatch(self, index: int, /) -> str:
        """What is wrong with the rows that the dispatch delivered; "" if nothing, or if only the
        output of combine can be compared."""
        ...


def chain(implementation: Implementation, pairs: int, num_sets: int) -> Body:
    """`pairs` dispatch -> combine pairs back to back, over rotating inputs; a section per op."""

    def body(mark: Mark) -> None:
        for pair in range(pairs):
            op = ""
            for step in implementation.steps(pair % num_sets):
                if step.op != op:
                    op = step.op
                    mark(op)
                step.run()

    return body


def chain_of_parts(implementation: Implementation, pairs: int, num_sets: int) -> Body:
    """The same, with a section per launch."""

    def body(mark: Mark) -> None:
        for pair in range(pairs):
            for step in implementation.steps(pair % num_sets):
                mark(step.name)
                step.run()

    return body


def with_experts(implementation: Implementation, index: int) -> Body:
    """One pair with the stand-in experts between dispatch and combine."""

    def body(_mark: Mark) -> None:
        steps = implementation.steps(index)
        for step in steps:
            if step.op == "dispatch":
                step.run()
        implementation.apply_experts(index)
        for step in steps:
            if step.op == "combine":
                step.run()

    return body


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a check on this rank: the largest error, and "" or what is wrong."""

    error: float
    reason: str


def check(implementation: Implementation, problem: Problem, clock: Clock) -> Verdict:
    """Run every input set eagerly and the first one also the way it is timed, twice.

    Goes on after a wrong result, so that all ranks make the same calls.
    """
    worst, reasons = 0.0, []

    def judge(what: str, index: int, run: Callable[[], None]) -> None:
        nonlocal worst
        error = _compare(implementation, problem, index, run)
        worst = max(worst, error)
        if not error <= implementation.error_limit:
            reasons.append(f"{what}: combine is off by {error:.3g}")
        wrong = implementation.check_dispatch(index)
        if wrong:
            reasons.append(f"{what}: {wrong}")

    for index in range(len(problem.inputs)):
        body = with_experts(implementation, index)
        judge(f"eager, input set {index}", index, partial(body, _no_mark))
    replay = clock.once(with_experts(implementation, 0))
    for number in (1, 2):
        judge(f"replay {number}", 0, replay)
    return Verdict(worst, "; ".join(reasons[:2]))


def poison(implementation: Implementation, index: int) -> None:
    """Fill the output with NaN: every element must be written."""
    implementation.output(index).fill_(float("nan"))


def check_after_timing(implementation: Implementation, problem: Problem) -> str:
    """What is wrong with the output that the timed chain left for input set 0, or "".

    The experts' results of `check` are still in place, and the chain has combined them again.
    """
    error = _error(implementation, problem, 0)
    if not implementation.rows_stay or error <= implementation.error_limit:
        return ""
    return f"after the timed replays: combine is off by {error:.3g}"


def _compare(
    implementation: Implementation, problem: Problem, index: int, run: Callable[[], None]
) -> float:
    poison(implementation, index)
    run()
    return _error(implementation, problem, index)


def _error(implementation: Implementation, problem: Problem, index: int) -> float:
    expected = expected_output(
        problem.inputs[index], problem.sizes.num_experts, problem.dispatch_format
    )
    return relative_error(implementation.output(index), expected)


def _no_mark(_name: str) -> None:
    """A mark where nothing is timed."""
