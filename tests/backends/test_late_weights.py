"""Weights that come with the combine: others each time, and ahead of every row that needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drivers import Options
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, SequenceError, reference
from ep_runtime.reference import RankInput

OpenGroup = Callable[[EpConfig], Group]
LATE = Options(late=True)


def other_weights(rng: torch.Generator, inputs: list[RankInput]) -> list[RankInput]:
    return [
        replace(one, topk_weights=torch.randn(one.topk_weights.shape, generator=rng))
        for one in inputs
    ]


def open_or_skip(open_group: OpenGroup, config: EpConfig) -> Group:
    group = open_group(config)
    if not group.can_fuse:
        pytest.skip("late weights need a device per rank")
    return group


@pytest.mark.parametrize("recv_format", ["batched", "contiguous"])
def test_every_combine_brings_its_own_weights(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    config = random_config(rng, place.num_ranks, 384, 5, recv_format=recv_format)
    group = open_or_skip(open_group, config)
    for _ in range(2):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        check_received(group.dispatch(inputs, options=LATE), expected)
        for _ in range(3):
            inputs = other_weights(rng, inputs)
            outputs = random_outputs(rng, expected)
            got = group.combine(outputs, weights=[one.topk_weights for one in inputs])
            check_combined(got, config, inputs, outputs)


def test_both_kinds_of_handles_mix_on_a_chain(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Many tokens and entries: the weights take several lines of memory."""
    config = random_config(rng, place.num_ranks, 128, 16, max_tokens=40)
    group = open_or_skip(open_group, config)
    group.all("open_receive", "late", {})
    for _ in range(3):
        late = [random_input(rng, config, 40) for _ in range(place.num_ranks)]
        early = random_inputs(rng, config, place.num_ranks)
        late_rows, early_rows = reference.dispatch(config, late), reference.dispatch(config, early)
        check_received(group.dispatch(late, options=replace(LATE, into="late")), late_rows)
        check_received(group.dispatch(early), early_rows)
        for _ in range(2):
            late = other_weights(rng, late)
            outputs = random_outputs(rng, late_rows)
            got = group.combine(outputs, of="late", weights=[one.topk_weights for one in late])
            check_combined(got, config, late, outputs)
            outputs = random_outputs(rng, early_rows)
            check_combined(group.combine(outputs), config, early, outputs)


@pytest.mark.parametrize("fused", [False, True])
def test_lists_of_rows_end_where_memory_held_others(
    open_group: OpenGroup, place: Place, rng: torch.Generator, fused: bool
) -> None:
    """Few entries of many: most of the weights' table is never sent."""
    config = random_config(rng, place.num_ranks, 256, 3, max_tokens=40)
    group = open_or_skip(open_group, config)
    group.all("open_receive", "late", {})
    for most in (2, 9, 1):
        inputs = [random_input(rng, config, most) for _ in range(place.num_ranks)]
        expected = reference.dispatch(config, inputs)
        options = replace(LATE, into="late")
        if fused:
            check_received(group.dispatch_fused(inputs, options=options), expected)
        else:
            check_received(group.dispatch(inputs, options=options), expected)
        outputs = random_outputs(rng, expected)
        weights = [one.topk_weights for one in inputs]
        combine = group.combine_fused if fused else group.combine
        check_combined(combine(outputs, of="late", weights=weights), config, inputs, outputs)


def test_fused_combines_take_late_weights(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_or_skip(open_group, config)
    for _ in range(3):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        check_received(group.dispatch_fused(inputs, options=LATE), expected)
        for _ in range(2):
            inputs = other_weights(rng, inputs)
            outputs = random_outputs(rng, expected)
            weights = [one.topk_weights for one in inputs]
            check_combined(group.combine_fused(outputs, weights=weights), config, inputs, outputs)


def test_ranks_that_share_a_device_are_refused(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 128, 2)
    group = open_group(config)
    if group.can_fuse:
        pytest.skip("every rank has a device of its own")
    given = [(random_input(rng, config, 3), 0, None, 0, LATE) for _ in range(place.num_ranks)]
    for refused in group.outcomes("dispatch", given):
        assert isinstance(refused, SequenceError), refused
        assert "use processes" in str(refused)
    assert group.all("query", "epochs", 0) == [(0, 0)] * place.num_ranks
