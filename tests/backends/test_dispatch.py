"""Dispatch delivers the reference's bits, in the reference's order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference

OpenGroup = Callable[[EpConfig], Group]
FORMATS = ["batched", "contiguous", "compact"]
MANY = 480  # messages


def pair(group: Group, config: EpConfig, rng: torch.Generator, **options: object) -> None:
    """One dispatch and one combine with random inputs, both checked."""
    inputs = random_inputs(rng, config, group.num_ranks, padded=True)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs, **options), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs), config, inputs, outputs)


@pytest.mark.parametrize("recv_format", FORMATS)
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "topk"), [(128, 1), (384, 8), (256, 32)])
def test_random_pairs_match_the_reference(
    open_group: OpenGroup,
    place: Place,
    rng: torch.Generator,
    hidden: int,
    topk: int,
    wire: str,
    recv_format: str,
) -> None:
    config = random_config(
        rng, place.num_ranks, hidden, topk, dispatch_format=wire, recv_format=recv_format
    )
    group = open_group(config)
    for _ in range(3):
        pair(group, config, rng)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_rows_of_a_large_model(open_group: OpenGroup, rng: torch.Generator, wire: str) -> None:
    config = EpConfig(num_experts=64, topk=8, hidden=7168, max_tokens=8, dispatch_format=wire)
    group = open_group(config)
    for _ in range(2):
        pair(group, config, rng)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_widest_row_and_most_experts(
    open_group: OpenGroup, rng: torch.Generator, wire: str
) -> None:
    """On a GPU the BF16 messages of a CTA need more shared memory than a kernel has unasked."""
    config = EpConfig(
        num_experts=1024,
        topk=32,
        hidden=16384,
        max_tokens=2,
        recv_format="compact",
        dispatch_format=wire,
    )
    pair(open_group(config), config, rng)


@pytest.mark.parametrize("messages", [MANY, 2112], ids=["many", "very many"])
@pytest.mark.parametrize(
    ("wire", "recv_format", "topk", "more"),
    [
        ("fp8", "batched", 8, {}),
        ("fp8", "compact", 3, {}),
        ("fp8", "contiguous", 8, {"scale_format": "ue8m0"}),
        ("bf16", "contiguous", 9, {}),
        ("opaque", "batched", 4, {"opaque_row_bytes": 528, "opaque_scale_words": 700}),
    ],
)
def test_many_messages_to_an_sm(
    open_group: OpenGroup,
    place: Place,
    rng: torch.Generator,
    wire: str,
    recv_format: str,
    topk: int,
    more: dict[str, object],
    messages: int,
) -> None:
    """GPUs have kernels for them: rounds of tokens, a message to a warp, CTAs that only send."""
    if place.backend == "host" and messages > MANY:
        pytest.skip("CPU ranks have one way, however many messages come")
    config = random_config(
        rng,
        place.num_ranks,
        384,
        topk,
        max_tokens=messages // place.num_ranks,
        dispatch_format=wire,
        recv_format=recv_format,
        **more,
    )
    group = open_group(config)
    for fused in (False, group.can_fuse):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        got = group.dispatch_fused(inputs) if fused else group.dispatch(inputs)
        check_received(got, expected)
        outputs = random_outputs(rng, expected, config.hidden)
        check_combined(group.combine(outputs), config, inputs, outputs)


def test_aligned_experts_start_at_multiples(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4, recv_format="contiguous", alignment=16)
    group = open_group(config)
    for _ in range(2):
        inputs = random_inputs(rng, config, place.num_ranks)
        got = group.dispatch(inputs)
        expected = reference.dispatch(config, inputs)
        check_received(got, expected)
        for one in got:
            assert one.expert_offset is not None
            assert (one.expert_offset % 16 == 0).all()
        outputs = random_outputs(rng, expected)
        check_combined(group.combine(outputs), config, inputs, outputs)


@pytest.mark.parametrize("expected_tokens", [0, 1, 24])
def test_expected_tokens_changes_no_result(
    open_group: OpenGroup, place: Place, rng: torch.Generator, expected_tokens: int
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    for _ in range(2):
        pair(group, config, rng, expected=expected_tokens)


def test_row_stride_may_exceed_hidden(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    inputs = random_inputs(rng, config, place.num_ranks)
    expected = reference.dispatch(config, inputs)
    check_received(group.dispatch(inputs, extra_stride=8), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs, extra_stride=24), config, inputs, outputs)


def test_nobody_sends_anything(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    config = random_config(rng, place.num_ranks, 256, 4, recv_format="contiguous")
    group = open_group(config)
    nothing = [
        reference.RankInput(
            torch.empty(0, 256, dtype=torch.bfloat16),
            torch.empty(0, 4, dtype=torch.int64),
            torch.empty(0, 4),
        )
    ] * place.num_ranks
    for _ in range(2):
        expected = reference.dispatch(config, nothing)
        check_received(group.dispatch(nothing), expected)
        outputs = random_outputs(rng, expected)
        assert all(out.shape == (0, 256) for out in group.combine(outputs))
    pair(group, config, rng)


def test_fused_operations_match_the_reference(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 384, 8)
    group = open_group(config)
    if not group.can_fuse:
        pytest.skip("fused operations need a device per rank")
    for chain in (0, 1, 0):
        inputs = random_inputs(rng, config, place.num_ranks, padded=True)
        expected = reference.dispatch(config, inputs)
        check_received(group.dispatch_fused(inputs, chain), expected)
        outputs = random_outputs(rng, expected)
        check_combined(group.combine_fused(outputs, chain), config, inputs, outputs)


def test_statistics_count_messages_rows_and_bytes(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 256, 4)
    group = open_group(config)
    inputs = random_inputs(rng, config, place.num_ranks)
    expected = reference.dispatch(config, inputs)
    group.dispatch(inputs, chain=1)
    group.combine(random_outputs(rng, expected), chain=1)
    stats = group.all("query", "stats", 1)
    for mine, right in zip(stats, expected, strict=True):
        assert mine.messages_received == int(right.num_messages.sum())
        assert mine.rows_received == int(right.recv_count.sum())
        assert mine.bytes_combined == mine.messages_received * 2 * config.hidden
    assert sum(s.messages_sent for s in stats) == sum(s.messages_received for s in stats)
    assert all(
        s.bytes_dispatched > s.messages_sent * config.hidden for s in stats if s.messages_sent
    )
    assert all(s.messages_sent == 0 for s in group.all("query", "stats", 0))
