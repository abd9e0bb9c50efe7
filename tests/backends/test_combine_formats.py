"""FP8 combines: a rank's sums travel as e4m3 with a scale per 128 channels, its own as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drivers import PLAIN, Options
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import ConfigError, EpConfig, reference
from ep_runtime.reference import RankInput

OpenGroup = Callable[[EpConfig], Group]
FP8 = Options(combine_format="fp8")


def check_pair(
    group: Group, config: EpConfig, rng: torch.Generator, options: Options = PLAIN
) -> None:
    """A dispatch and two combines of it, which give the same bits."""
    wire = config if options.combine_format is None else replace(config, combine_format="fp8")
    inputs = random_inputs(rng, config, group.num_ranks, padded=True)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs, options=options), expected)
    outputs = random_outputs(rng, expected)
    first, second = group.combine(outputs), group.combine(outputs)
    check_combined(first, wire, inputs, outputs)
    for one, again in zip(first, second, strict=True):
        assert torch.equal(one.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(128, id="one group"),
        pytest.param(896, id="seven groups, a whole block of lines"),
        pytest.param(1152, id="nine groups"),
        pytest.param(2048, id="sixteen groups"),
    ],
)
def test_sums_travel_as_fp8(
    open_group: OpenGroup, place: Place, rng: torch.Generator, hidden: int, recv_format: str
) -> None:
    config = random_config(
        rng, place.num_ranks, hidden, 4, recv_format=recv_format, combine_format="fp8"
    )
    group = open_group(config)
    for _ in range(3):
        check_pair(group, config, rng)


def test_every_combine_may_choose(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """A short row in the slot of a long one, before and after it."""
    config = random_config(rng, place.num_ranks, 384, 4)
    group = open_group(config)
    for _ in range(8):
        short = bool(torch.randint(2, (), generator=rng))
        check_pair(group, config, rng, FP8 if short else Options())


def calc_diff(got: torch.Tensor, right: torch.Tensor) -> float:
    """1 - the cosine-like similarity that engines accept quantised kernels by."""
    a, b = got.double(), right.double()
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


@pytest.mark.parametrize(
    ("combine_format", "least", "most"), [("bf16", 0, 1e-5), ("fp8", 5e-5, 5e-4)]
)
def test_precision_at_the_size_of_a_model(
    open_group: OpenGroup,
    place: Place,
    rng: torch.Generator,
    combine_format: str,
    least: float,
    most: float,
) -> None:
    config = random_config(
        rng, place.num_ranks, 7168, 8, max_tokens=4, combine_format=combine_format
    )
    group = open_group(config)
    inputs = [random_input(rng, config, 4) for _ in range(place.num_ranks)]
    for one in inputs:
        one.topk_weights.copy_(torch.rand(one.topk_weights.shape, generator=rng))
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = []
    for one in expected:
        y = torch.randn(one.x.shape, generator=rng).bfloat16()
        y[~one.valid] = float("nan")
        outputs.append(y)
    got = torch.cat(group.combine(outputs))
    right = torch.cat([one.exact for one in reference.combine(config, inputs, outputs)])
    assert least < calc_diff(got, right) < most


def one_row(config: EpConfig, num_ranks: int) -> list[RankInput]:
    """A token of rank 0 for the first expert of rank 1."""
    experts = config.local_experts(num_ranks)
    return [
        RankInput(
            torch.ones(rows, config.hidden).bfloat16(),
            torch.full((rows, 1), experts, dtype=torch.int64),
            torch.ones(rows, 1),
        )
        for rows in [1] + [0] * (num_ranks - 1)
    ]


def test_a_group_keeps_its_own_magnitude(open_group: OpenGroup, place: Place) -> None:
    """Rows far from one are as precise as others; zeros stay zeros."""
    config = EpConfig(
        num_experts=2 * place.num_ranks, topk=1, hidden=1024, max_tokens=2, combine_format="fp8"
    )
    group = open_group(config)
    inputs = one_row(config, place.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = [torch.zeros_like(one.x, dtype=torch.bfloat16) for one in expected]
    magnitudes = torch.tensor([2.0**e for e in (-90, -40, -17, 0, 13, 60, 100)])
    sign = torch.tensor([1.0, -1.0]).repeat(64)
    row = torch.cat([*(m * sign for m in magnitudes), torch.zeros(128)])
    outputs[1][0, 0] = row.bfloat16()
    got = group.combine(outputs)[0][0].float()
    assert torch.equal(got, row)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_group(
    open_group: OpenGroup, place: Place, bad: float
) -> None:
    config = EpConfig(
        num_experts=2 * place.num_ranks, topk=1, hidden=384, max_tokens=2, combine_format="fp8"
    )
    group = open_group(config)
    inputs = one_row(config, place.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = [torch.ones_like(one.x, dtype=torch.bfloat16) for one in expected]
    outputs[1][0, 0, 130] = bad
    got = group.combine(outputs)[0][0].float()
    assert (got[:128] == 1).all()
    assert got[130].isnan()
    assert (got[256:] == 1).all()


def test_fused_and_with_late_weights(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 1152, 4, combine_format="fp8")
    group = open_group(config)
    if not group.can_fuse:
        pytest.skip("ranks that share a thread or a GPU cannot fuse")
    for late in (False, True):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        check_received(group.dispatch_fused(inputs, options=Options(late=late)), expected)
        outputs = random_outputs(rng, expected)
        weights = [torch.rand(one.topk_weights.shape, generator=rng) for one in inputs]
        got = group.combine_fused(outputs, weights=weights if late else None)
        if late:
            inputs = [replace(one, topk_weights=w) for one, w in zip(inputs, weights, strict=True)]
        check_combined(got, config, inputs, outputs)


def test_a_heap_for_fp8_has_no_room_for_bf16(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4, combine_format="fp8")
    group = open_group(config)
    inputs = random_inputs(rng, config, place.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs, options=Options(combine_format="bf16")), expected)
    outputs = random_outputs(rng, expected)
    for outcome in group.outcomes("combine", [(y, 0) for y in outputs]):
        assert isinstance(outcome, ConfigError)
        assert "combine_format='bf16'" in str(outcome)
