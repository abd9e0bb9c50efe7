"""Delivered rows, bit by bit: those of the reference pass, and a single changed bit does not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from ep_runtime import reference
from ep_runtime.bench.delivered import expected_places, wrong_rows
from ep_runtime.bench.implementation import Problem
from ep_runtime.bench.routing import Sizes
from ep_runtime.config import DispatchFormat, EpConfig, RecvFormat
from ep_runtime.handles import Handle, Received, Uses
from ep_runtime.reference import RankInput

SIZES = Sizes(num_ranks=2, num_tokens=6, hidden=384, topk=3, num_experts=8, skew="uniform", seed=5)
FORMATS: list[tuple[DispatchFormat, RecvFormat]] = [
    ("fp8", "batched"),
    ("bf16", "batched"),
    ("fp8", "contiguous"),
    ("bf16", "contiguous"),
    ("fp8", "compact"),
    ("bf16", "compact"),
]


def case(
    wire: DispatchFormat, recv: RecvFormat, sizes: Sizes = SIZES
) -> tuple[Received, Problem, EpConfig, torch.Tensor]:
    """What rank 1 ought to receive, as if its Buffer had: and which rows of x are defined."""
    config = EpConfig(
        num_experts=8,
        topk=3,
        hidden=384,
        max_tokens=8,
        dispatch_format=wire,
        recv_format=recv,
        alignment=4 if recv == "contiguous" else 1,
    )
    problem = Problem.make(sizes, 1, 8, wire, 1, torch.device("cpu"))
    inputs = [RankInput(one.x, one.topk_idx, one.topk_weights) for one in problem.everyone[0]]
    expected = reference.dispatch(config, inputs)[1]
    names = {field.name for field in fields(Received)} - {"handle"}
    handle = Handle(object(), 0, 6, None, 0, False, torch.empty(0), Uses(), 0, Uses(), 0)
    received = Received(**{name: getattr(expected, name) for name in names}, handle=handle)
    for name in ("x", "scales", "topk_idx", "topk_weights", "source_token"):
        tensor = getattr(received, name)
        if tensor is not None:  # undefined rows may hold anything
            rows = tensor.unsqueeze(-1) if name == "source_token" else tensor
            rows.view(torch.uint8)[~expected.valid] = 0x5A
    return received, problem, config, expected.valid


def verdict(received: Received, problem: Problem, config: EpConfig) -> str:
    return wrong_rows(received, problem, expected_places(problem, config, 0), 0)


@pytest.mark.parametrize(("wire", "recv"), FORMATS)
def test_the_references_rows_pass_whatever_lies_beside_them(
    wire: DispatchFormat, recv: RecvFormat
) -> None:
    received, problem, config, valid = case(wire, recv)
    assert 0 < valid.sum() < valid.numel()
    assert verdict(received, problem, config) == ""


@pytest.mark.parametrize(("wire", "recv"), FORMATS)
def test_one_changed_bit_is_found_in_any_tensor(wire: DispatchFormat, recv: RecvFormat) -> None:
    names = [field.name for field in fields(Received) if field.name != "handle"]
    found = 0
    for name in names:
        received, problem, config, valid = case(wire, recv)
        tensor = getattr(received, name)
        if tensor is None:
            continue
        if name == "topk_weights":  # of an expert of this rank
            assert received.topk_idx is not None
            where = (valid.unsqueeze(-1) & (received.topk_idx >= 0)).nonzero()[-1]
        elif name == "source_token":
            where = valid.nonzero()[-1]
        elif name in ("x", "scales", "topk_idx"):
            where = torch.cat([valid.nonzero()[-1], torch.tensor([tensor.shape[-1] - 1])])
        else:
            where = torch.tensor(tensor.shape) - 1
        element = tensor[tuple(where.tolist())].reshape(1)
        changed = element.view(torch.uint8) ^ torch.tensor([1] + [0] * (element.element_size() - 1))
        tensor[tuple(where.tolist())] = changed.to(torch.uint8).view(tensor.dtype)[0]
        assert verdict(received, problem, config) != "", name
        found += 1
    assert found == {"batched": 5, "contiguous": 4, "compact": 5}[recv] + (wire == "fp8")


def test_rows_of_two_sources_in_the_wrong_order_are_found() -> None:
    received, problem, config, valid = case("bf16", "compact")
    first, *_, last = valid.nonzero().flatten().tolist()
    received.x[[first, last]] = received.x[[last, first]]
    assert "rows differ" in verdict(received, problem, config)


def test_missing_scales_are_found() -> None:
    received, problem, config, _ = case("fp8", "batched")
    received.scales = None
    assert "scales are missing" in verdict(received, problem, config)


def test_ranks_without_tokens_are_skipped() -> None:
    received, problem, config, _ = case("fp8", "batched", replace(SIZES, skew="half-empty"))
    assert received.num_messages.tolist()[1] == 0
    assert verdict(received, problem, config) == ""
