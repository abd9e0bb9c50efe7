"""Combine adds in a fixed order, in FP32, and rounds to BF16 where it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference

OpenGroup = Callable[[EpConfig], Group]


@pytest.mark.parametrize("recv_format", ["batched", "compact"])
def test_equal_inputs_give_equal_bits(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    config = random_config(rng, place.num_ranks, 384, 8, recv_format=recv_format)
    group = open_group(config)
    inputs = [random_input(rng, config, config.max_tokens) for _ in range(place.num_ranks)]
    outputs = random_outputs(rng, reference.dispatch(config, inputs))
    results = []
    for chain in (0, 1, 0):
        group.dispatch(inputs, chain)
        results.append(group.combine(outputs, chain))
    check_combined(results[0], config, inputs, outputs)
    for again in results[1:]:
        for first, second in zip(results[0], again, strict=True):
            assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_tokens_without_experts_and_padding_come_back_zero(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    inputs = []
    for _ in range(place.num_ranks):
        one = random_input(rng, config, 12, num_tokens=9)
        one.topk_idx[3] = -1
        inputs.append(one)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    for out in group.combine(random_outputs(rng, expected)):
        assert (out[3] == 0).all()
        assert (out[9:] == 0).all()


def test_combine_may_follow_much_later(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """A dispatch whose combine comes after other work on another chain."""
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    early = random_inputs(rng, config, place.num_ranks)
    group.dispatch(early, chain=1)
    for _ in range(3):
        inputs = random_inputs(rng, config, place.num_ranks)
        group.dispatch(inputs)
        outputs = random_outputs(rng, reference.dispatch(config, inputs))
        check_combined(group.combine(outputs), config, inputs, outputs)
    outputs = random_outputs(rng, reference.dispatch(config, early))
    check_combined(group.combine(outputs, chain=1), config, early, outputs)


def test_two_chains_interleave(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    """send A | send B | receive A | combine A | receive B | ...: what an overlapped step does."""
    config = random_config(rng, place.num_ranks, 256, 4, recv_format="contiguous")
    group = open_group(config)
    for _ in range(4):
        a = random_inputs(rng, config, place.num_ranks)
        b = random_inputs(rng, config, place.num_ranks)
        group.each("dispatch", [(one, 0) for one in a])
        group.each("dispatch", [(one, 1) for one in b])
        right_a, right_b = reference.dispatch(config, a), reference.dispatch(config, b)
        check_received(group.all("receive", 0), right_a)
        outputs_a, outputs_b = random_outputs(rng, right_a), random_outputs(rng, right_b)
        group.each("combine", [(y, 0) for y in outputs_a])
        check_received(group.all("receive", 1), right_b)
        group.each("combine", [(y, 1) for y in outputs_b])
        check_combined(group.all("collect", 0), config, a, outputs_a)
        check_combined(group.all("collect", 1), config, b, outputs_b)


BIG = 2.0**30  # BIG - BIG + 1 is 1, in every other order of three FP32 additions it is 0


def summed(group: Group, config: EpConfig, experts: list[int], values: list[float]) -> float:
    """What rank 0's token gets from `experts` (in k order, weight 1) that return `values`."""
    local = config.local_experts(group.num_ranks)
    inputs = [
        reference.RankInput(
            torch.ones(rows, config.hidden).bfloat16(),
            torch.tensor([experts] * rows, dtype=torch.int64).view(rows, config.topk),
            torch.ones(rows, config.topk),
        )
        for rows in [1] + [0] * (group.num_ranks - 1)
    ]
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs), expected)
    outputs = [torch.zeros_like(one.x, dtype=torch.bfloat16) for one in expected]
    for expert, value in zip(experts, values, strict=True):
        outputs[expert // local][expert % local, 0] = value
    return float(group.combine(outputs)[0][0, -1])


def test_a_ranks_experts_are_added_in_the_order_of_topk(
    open_group: OpenGroup, place: Place
) -> None:
    config = EpConfig(num_experts=3 * place.num_ranks, topk=3, hidden=128, max_tokens=2)
    group = open_group(config)
    for order in ([3, 4, 5], [5, 3, 4], [4, 5, 3], [5, 4, 3]):  # rank 1's experts
        assert summed(group, config, order, [BIG, -BIG, 1.0]) == 1.0
        assert summed(group, config, order, [BIG, 1.0, -BIG]) == 0.0
        assert summed(group, config, order, [1.0, BIG, -BIG]) == 0.0


def test_ranks_are_added_in_their_order(open_group: OpenGroup, place: Place) -> None:
    if place.num_ranks < 3:
        pytest.skip("two numbers add up to the same in both orders")
    config = EpConfig(num_experts=place.num_ranks, topk=3, hidden=128, max_tokens=2)
    group = open_group(config)
    last = place.num_ranks - 1
    for experts, values in (
        ([0, 1, last], [BIG, -BIG, 1.0]),
        ([last, 0, 1], [1.0, BIG, -BIG]),
        ([1, last, 0], [-BIG, 1.0, BIG]),
    ):
        assert summed(group, config, experts, values) == 1.0
    assert summed(group, config, [0, 1, last], [1.0, BIG, -BIG]) == 0.0
