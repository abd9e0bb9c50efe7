"""The reference and a Buffer's own tensors do not follow torch's default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from support import new_rng, random_inputs, random_outputs

from ep_runtime import EpConfig, reference, virtual_ranks


@pytest.fixture
def bf16_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def dtypes(value: Any) -> dict[str, torch.dtype]:
    """Of every field that is a tensor."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: one.dtype for name, one in found.items() if isinstance(one, torch.Tensor)}


def make(recv_format: str) -> EpConfig:
    return EpConfig(num_experts=8, topk=2, hidden=256, max_tokens=8, recv_format=recv_format)  # type: ignore[arg-type]


@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
def test_reference_gives_the_same_bits(recv_format: str) -> None:
    config, rng = make(recv_format), new_rng()
    inputs = random_inputs(rng, config, 2)
    right = reference.dispatch(config, inputs)
    outputs = random_outputs(rng, right)
    combined = reference.combine(config, inputs, outputs)
    in_order = reference.combine_in_order(config, inputs, outputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = reference.dispatch(config, inputs)
        got_combined = reference.combine(config, inputs, outputs)
        got_in_order = reference.combine_in_order(config, inputs, outputs)
    finally:
        torch.set_default_dtype(before)
    for mine, other in zip(got, right, strict=True):
        assert dtypes(mine) == dtypes(other)
        if mine.topk_weights is not None and other.topk_weights is not None:
            assert torch.equal(mine.topk_weights, other.topk_weights)
    for one, two in zip(got_combined, combined, strict=True):
        assert torch.equal(one.exact, two.exact)
        assert torch.equal(one.bound, two.bound)
    for here, there in zip(got_in_order, in_order, strict=True):
        assert torch.equal(here, there)


@pytest.mark.usefixtures("bf16_default")
def test_received_tensors_have_the_documented_dtypes() -> None:
    (buffer,) = virtual_ranks(make("compact"), 1, "host")
    with buffer:
        received = buffer.new_receive().received
        assert received.scales is not None
        assert received.scales.dtype is torch.float32
        assert received.topk_weights is not None
        assert received.topk_weights.dtype is torch.float32
