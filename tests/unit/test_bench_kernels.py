"""The Triton kernels around the collective peers, against the same steps in plain torch."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from ep_runtime.bench.implementation import Problem
from ep_runtime.bench.peers.collectives import load_kernels
from ep_runtime.bench.peers.wire import Wire, pack_rows, slots_by_rank
from ep_runtime.bench.routing import Sizes

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZES = Sizes(num_ranks=2, num_tokens=9, hidden=384, topk=3, num_experts=8, skew="uniform", seed=1)
FIRST, LOCAL, CAPACITY = 4, 4, 20  # this is rank 1 of 2


@pytest.fixture
def kernels() -> ModuleType:
    return load_kernels()


def packed(wire_format: str) -> tuple[Wire, Problem, torch.Tensor, torch.Tensor]:
    """wire, problem, rows [18, row_bytes] packed by plain torch, slots"""
    problem = Problem.make(SIZES, 1, 10, wire_format, 1, DEVICE)
    wire = Wire(384, 3, wire_format)
    rows = wire.empty_rows(18, DEVICE)
    slots = slots_by_rank(problem.inputs[0].topk_idx, 2, LOCAL, [0, 9])
    pack_rows(wire, rows, problem.inputs[0], slots)
    return wire, problem, rows, slots


@pytest.mark.parametrize("wire_format", ["fp8", "bf16"])
def test_pack_quantises_and_places_rows_and_zeroes_the_counts(
    kernels: ModuleType, wire_format: str
) -> None:
    wire, problem, expected, slots = packed(wire_format)
    rows = wire.empty_rows(18, DEVICE)
    counts = torch.full((LOCAL,), 7, dtype=torch.int32, device=DEVICE)
    kernels.pack(wire, rows, problem.inputs[0], slots, counts)
    assert counts.tolist() == [0] * LOCAL
    got, want = wire.views(rows), wire.views(expected)
    assert torch.equal(got.topk_idx, want.topk_idx)
    assert torch.equal(got.topk_weights, want.topk_weights)
    if wire_format == "bf16":
        assert torch.equal(got.values, want.values)
        return
    # Its division is off by an ulp: scales too, and values that are exact ties go the other way.
    torch.testing.assert_close(got.scales, want.scales, rtol=3e-7, atol=0)
    one, other = (views.values.view(torch.uint8).int() for views in (got, want))
    assert torch.equal(one & 0x80, other & 0x80)
    steps = ((one & 0x7F) - (other & 0x7F)).abs()
    assert steps.max() <= 1
    assert steps.float().mean() < 0.01


@pytest.mark.parametrize("wire_format", ["fp8", "bf16"])
def test_permute_gives_every_entry_of_this_rank_a_row_of_its_expert(
    kernels: ModuleType, wire_format: str
) -> None:
    wire, _, rows, _ = packed(wire_format)
    views = wire.views(rows)
    x = torch.zeros(LOCAL, CAPACITY, 384, dtype=views.values.dtype, device=DEVICE)
    scales = torch.zeros(LOCAL, CAPACITY, 3, device=DEVICE) if wire.fp8 else None
    counts = torch.zeros(LOCAL, dtype=torch.int32, device=DEVICE)
    place = torch.full((18, 3), -9, dtype=torch.int32, device=DEVICE)
    kernels.permute(wire, views, FIRST, counts, x, scales, place)

    here = views.topk_idx >= FIRST
    assert counts.tolist() == [int((views.topk_idx == FIRST + e).sum()) for e in range(LOCAL)]
    assert (place[~here] == -1).all()
    assert len(set(place[here].tolist())) == int(here.sum())
    assert torch.equal(place[here] // CAPACITY, views.topk_idx[here] - FIRST)
    source = here.nonzero()[:, 0]
    rows_of = (x.view(torch.uint8).flatten(0, 1), views.values.contiguous().view(torch.uint8))
    assert torch.equal(rows_of[0][place[here].long()], rows_of[1][source])
    if scales is not None and views.scales is not None:
        assert torch.equal(scales.flatten(0, 1)[place[here].long()], views.scales[source])


def test_weighted_sum_leaves_out_missing_rows(kernels: ModuleType) -> None:
    generator = torch.Generator(DEVICE).manual_seed(2)
    y = torch.randn(40, 384, device=DEVICE, generator=generator).bfloat16()
    place = torch.randint(-1, 40, (18, 3), device=DEVICE, generator=generator).int()
    weights = torch.rand(18, 3, device=DEVICE, generator=generator)
    out = torch.full((18, 384), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    kernels.weighted_sum(y, place, weights, out)
    factors = torch.where(place >= 0, weights, 0).double()
    expected = (y[place.clamp(min=0).long()].double() * factors.unsqueeze(-1)).sum(dim=1)
    assert (out.double() - expected).norm() < 4e-3 * expected.norm()


def test_a_rank_without_tokens_still_zeroes_the_counts(kernels: ModuleType) -> None:
    wire, problem, rows, slots = packed("fp8")
    inputs = problem.inputs[0]
    empty = type(inputs)(inputs.x[:0], inputs.topk_idx[:0], inputs.topk_weights[:0])
    counts = torch.full((LOCAL,), 7, dtype=torch.int32, device=DEVICE)
    before = rows.clone()
    kernels.pack(wire, rows, empty, slots[:0], counts)
    assert counts.tolist() == [0] * LOCAL
    assert torch.equal(rows, before)
