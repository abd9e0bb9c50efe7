"""The check before the timing: a right implementation passes, and each of many wrong ones fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from ep_runtime.bench.clock import HostClock
from ep_runtime.bench.experts import (
    amplify,
    dequantise,
    expected_output,
    gains,
    relative_error,
    weighted_gain,
)
from ep_runtime.bench.implementation import (
    ERROR_LIMIT,
    Problem,
    Step,
    check,
    check_after_timing,
    poison,
)
from ep_runtime.bench.routing import Sizes
from ep_runtime.bench.traffic import Traffic
from ep_runtime.reference import quantize_fp8

CPU = torch.device("cpu")
SIZES = Sizes(num_ranks=1, num_tokens=6, hidden=512, topk=3, num_experts=8, skew="uniform", seed=3)
Damage = Callable[[torch.Tensor], None]


def problem(wire: str = "fp8") -> Problem:
    return Problem.make(SIZES, 0, 8, wire, 2, CPU)


def nothing(_tensor: torch.Tensor) -> None:
    """No damage."""


@dataclass
class Local:
    """One rank that dispatches to itself: x, experts and weights pass through `damage_*`."""

    problem: Problem
    damage_rows: Damage = nothing
    damage_experts: Damage = nothing
    damage_weights: Damage = nothing
    damage_output: Damage = nothing
    only_call: int | None = None  # damage the output of this combine alone
    error_limit: float = ERROR_LIMIT
    rows_stay: bool = True
    wire_bytes: Traffic | None = None
    heap_bytes: int | None = None

    def __post_init__(self) -> None:
        self.out = [torch.empty_like(one.x) for one in self.problem.inputs]
        self.calls = 0

    def steps(self, index: int) -> Sequence[Step]:
        inputs = self.problem.inputs[index]

        def dispatch() -> None:
            self.rows, self.idx = inputs.x.clone(), inputs.topk_idx.clone()
            self.weights = inputs.topk_weights.clone()
            self.damage_rows(self.rows)
            self.damage_experts(self.idx)
            self.damage_weights(self.weights)

        def combine() -> None:
            written = self.reduced.clone()
            if self.only_call in (None, self.calls):
                self.damage_output(written)
            self.calls += 1
            keep = ~written.isinf()  # infinity: not written
            self.out[index][keep] = written[keep]

        return Step("dispatch", "", dispatch), Step("combine", "", combine)

    def apply_experts(self, _index: int) -> None:
        rows = self.rows
        if self.problem.dispatch_format == "fp8":
            rows = dequantise(*quantize_fp8(rows))
        gain = gains(8, 512)
        self.reduced = amplify(rows, weighted_gain(gain, self.idx, self.weights)).bfloat16()

    def output(self, index: int) -> torch.Tensor:
        return self.out[index]

    def settle(self) -> None:
        """Nothing runs elsewhere."""

    def check_dispatch(self, _index: int) -> str:
        return ""


CLOCK = HostClock(lambda: None)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_a_right_implementation_passes_with_rounding_error_alone(wire: str) -> None:
    verdict = check(Local(problem(wire)), problem(wire), CLOCK)
    assert verdict.reason == ""
    assert 0 < verdict.error < ERROR_LIMIT


def swap_two_experts(idx: torch.Tensor) -> None:
    idx[4, [0, 1]] = idx[4, [1, 0]]


def neighbouring_expert(idx: torch.Tensor) -> None:
    idx[5, 2] = (idx[5, 2] + 1) % 8


def rows_of_two_tokens_change_places(rows: torch.Tensor) -> None:
    rows[[0, 1]] = rows[[1, 0]]


def one_group_is_stale(rows: torch.Tensor) -> None:
    rows[3, 128:256] *= 1.05


def one_element_is_not_written(out: torch.Tensor) -> None:
    out[2, 77] = float("inf")


def one_element_is_nan(out: torch.Tensor) -> None:
    out[2, 77] = float("nan")


def weight_is_off_by_a_twentieth(weights: torch.Tensor) -> None:
    weights[1, weights[1].argmax()] *= 1.05


@pytest.mark.parametrize(
    "damage",
    [
        {"damage_experts": swap_two_experts},
        {"damage_experts": neighbouring_expert},
        {"damage_rows": rows_of_two_tokens_change_places},
        {"damage_rows": one_group_is_stale},
        {"damage_output": one_element_is_not_written},
        {"damage_output": one_element_is_nan},
        {"damage_weights": weight_is_off_by_a_twentieth},
    ],
    ids=lambda damage: next(iter(damage.values())).__name__,
)
def test_damage_to_one_token_is_found(damage: dict[str, Damage]) -> None:
    verdict = check(Local(problem("bf16"), **damage), problem("bf16"), CLOCK)  # type: ignore[arg-type]
    assert "combine is off" in verdict.reason
    assert not verdict.error <= ERROR_LIMIT


@pytest.mark.parametrize(
    ("call", "named"),
    [(0, "eager, input set 0"), (1, "eager, input set 1"), (2, "replay 1"), (3, "replay 2")],
)
def test_every_run_of_the_check_counts(call: int, named: str) -> None:
    one = Local(problem(), damage_output=one_element_is_nan, only_call=call)
    reason = check(one, problem(), CLOCK).reason
    assert reason.startswith(named)


def test_the_check_goes_on_after_a_wrong_result_so_that_ranks_stay_in_step() -> None:
    one = Local(problem(), damage_output=one_element_is_nan)
    check(one, problem(), CLOCK)
    assert one.calls == 4


def test_wrong_rows_are_reported_in_the_words_of_the_implementation() -> None:
    class Suspicious(Local):
        def check_dispatch(self, index: int) -> str:
            return f"rows of set {index} differ"

    reason = check(Suspicious(problem()), problem(), CLOCK).reason
    assert "eager, input set 0: rows of set 0 differ" in reason


def timed_chain(one: Local) -> str:
    """The check, then what a timed chain leaves, then the check of that."""
    check(one, one.problem, CLOCK)
    poison(one, 0)
    for index in (0, 1):
        one.steps(index)[1].run()
    return check_after_timing(one, one.problem)


def test_what_the_timed_chain_leaves_is_checked() -> None:
    assert timed_chain(Local(problem())) == ""
    damaged = Local(problem(), damage_output=one_element_is_not_written, only_call=4)
    assert "after the timed replays" in timed_chain(damaged)


def test_rows_without_a_fixed_place_are_not_compared_after_timing() -> None:
    moving = Local(problem(), damage_output=one_element_is_nan, only_call=4, rows_stay=False)
    assert timed_chain(moving) == ""


def test_expected_output_is_the_weighted_sum_of_amplified_rows() -> None:
    made = problem("bf16")
    inputs, gain = made.inputs[0], gains(8, 512).double()
    expected = torch.zeros(6, 512, dtype=torch.float64)
    for token in range(6):
        for k in range(3):
            channels = gain[inputs.topk_idx[token, k]].repeat_interleave(128)
            weight = inputs.topk_weights[token, k].double()
            expected[token] += weight * channels * inputs.x[token].double()
    torch.testing.assert_close(expected_output(inputs, 8, "bf16"), expected)


def test_fp8_is_compared_with_quantised_rows() -> None:
    made = problem("fp8")
    plain = expected_output(made.inputs[0], 8, "bf16")
    assert 0.01 < relative_error(plain, expected_output(made.inputs[0], 8, "fp8")) < 0.1


def test_any_two_experts_differ_clearly_in_some_group() -> None:
    gain = gains(256, 7168)
    for expert in range(256):
        others = torch.cat([gain[:expert], gain[expert + 1 :]])
        assert (others - gain[expert]).abs().amax(dim=-1).min() > 1.5


def test_no_tokens_are_no_error_and_a_wrong_shape_is() -> None:
    empty = torch.empty(0, 512)
    assert relative_error(empty, empty.double()) == 0.0
    assert relative_error(empty, torch.zeros(1, 512)) == float("inf")
