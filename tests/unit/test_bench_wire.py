"""Packed rows of the collective peers, and where tokens lie among them."""

from __future__ import annotations

import pytest
import torch

from ep_runtime.bench.peers.wire import Wire, pack_rows, slots_by_rank
from ep_runtime.bench.routing import Sizes, make_inputs
from ep_runtime.reference import dequantize_fp8, quantize_fp8

CPU = torch.device("cpu")
SIZES = Sizes(num_ranks=2, num_tokens=5, hidden=256, topk=3, num_experts=8, skew="uniform", seed=1)


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (Wire(7168, 8, "fp8"), 7168 + 224 + 64),
        (Wire(7168, 8, "bf16"), 14336 + 64),
        (Wire(128, 1, "fp8"), 144),  # 128 + 4 + 8, up to a multiple of 16
    ],
)
def test_bytes_of_a_packed_row(wire: Wire, expected: int) -> None:
    assert wire.row_bytes == expected


@pytest.mark.parametrize("wire_format", ["fp8", "bf16"])
def test_a_packed_token_is_read_back_in_each_of_its_rows(wire_format: str) -> None:
    wire, inputs = Wire(256, 3, wire_format), make_inputs(SIZES, 0, 0)
    rows = wire.empty_rows(12, CPU)
    slots = torch.tensor([[0, 7], [1, -1], [2, 8], [-1, 9], [-1, -1]], dtype=torch.int32)
    pack_rows(wire, rows, inputs, slots)
    views = wire.views(rows.clone())
    for row, token in {0: 0, 1: 1, 2: 2, 7: 0, 8: 2, 9: 3}.items():
        assert views.topk_idx[row].tolist() == inputs.topk_idx[token].tolist()
        assert torch.equal(views.topk_weights[row], inputs.topk_weights[token])
        if views.scales is None:
            assert torch.equal(views.values[row], inputs.x[token])
        else:
            expected = dequantize_fp8(*quantize_fp8(inputs.x[token : token + 1]))
            got = dequantize_fp8(views.values[row : row + 1], views.scales[row : row + 1])
            assert torch.equal(got, expected)


def test_rows_that_hold_no_token_name_no_expert() -> None:
    wire = Wire(256, 3, "fp8")
    rows = wire.empty_rows(4, CPU)
    slots = torch.tensor([[2]] * 1 + [[-1]] * 4, dtype=torch.int32)
    pack_rows(wire, rows, make_inputs(SIZES, 0, 0), slots)
    empty = wire.views(rows).topk_idx[[0, 1, 3]]
    assert torch.equal(empty, torch.full((3, 3), -1, dtype=torch.int32))


def test_slots_follow_tokens_within_the_rows_of_a_rank() -> None:
    # Experts 0, 1 are rank 0's; 2, 3 rank 1's.
    idx = torch.tensor([[0, 1], [3, 0], [-1, -1], [2, 3], [-1, 1]])
    slots = slots_by_rank(idx, num_ranks=2, num_local=2, starts=[0, 10])
    assert slots.tolist() == [[0, -1], [1, 10], [-1, -1], [-1, 11], [2, -1]]
