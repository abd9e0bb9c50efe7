"""The reference itself, against results worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from ep_runtime import EpConfig, reference
from ep_runtime.reference import RankInput
from ep_runtime.reference_wire import pack_ue8m0

CONFIG = EpConfig(
    num_experts=4, topk=2, hidden=128, max_tokens=3, dispatch_format="bf16", recv_format="batched"
)


def rows(*values: float) -> torch.Tensor:
    """One row per value, all channels equal."""
    return torch.tensor(values)[:, None].expand(-1, 128).bfloat16()


def two_ranks() -> list[RankInput]:
    """Experts 0 and 1 on rank 0, 2 and 3 on rank 1."""
    return [
        RankInput(
            rows(10, 11, 12),
            torch.tensor([[0, 2], [1, 0], [-1, -1]]),
            torch.tensor([[0.5, 0.25], [1.0, 2.0], [9.0, 9.0]]),
        ),
        RankInput(rows(20, 21), torch.tensor([[0, 3], [2, 3]]), torch.tensor([[4.0, 1.0]] * 2)),
    ]


def test_batched_rows_come_by_expert_then_source_then_token() -> None:
    first, second = reference.dispatch(CONFIG, two_ranks())
    assert first.recv_count.tolist() == [3, 1]
    assert first.x[0, :3, 0].tolist() == [10, 11, 20]
    assert first.x[1, :1, 0].tolist() == [11]
    assert first.num_messages.tolist() == [2, 1]
    assert first.valid.sum() == 4
    assert second.recv_count.tolist() == [2, 2]
    assert second.x[0, :2, 0].tolist() == [10, 21]
    assert second.x[1, :2, 0].tolist() == [20, 21]
    assert second.num_messages.tolist() == [1, 2]


def test_batched_rows_know_their_token_and_sources_their_range() -> None:
    first, second = reference.dispatch(CONFIG, two_ranks())
    assert first.source_token is not None
    assert first.source_token[0, :3].tolist() == [0, 1, 0]
    assert first.source_token[1, :1].tolist() == [1]
    assert first.layout_range is not None
    assert first.layout_range.tolist() == [[2, (2 << 32) | 1], [1, 1 << 32]]
    assert second.source_token is not None
    assert second.layout_range is not None
    assert second.layout_range.tolist() == [[1, (1 << 32) | 1], [0, 2]]
    assert second.source_token[1, :2].tolist() == [0, 1]


def test_contiguous_experts_start_at_multiples_of_the_alignment() -> None:
    config = replace(CONFIG, recv_format="contiguous", alignment=2)
    first, _ = reference.dispatch(config, two_ranks())
    assert first.expert_offset is not None
    assert first.expert_offset.tolist() == [0, 4, 6]
    assert first.x[[0, 1, 2, 4], 0].tolist() == [10, 11, 20, 11]
    assert first.valid.nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_compact_has_a_row_per_message_and_local_experts() -> None:
    config = replace(CONFIG, recv_format="compact")
    first, second = reference.dispatch(config, two_ranks())
    assert first.x[:3, 0].tolist() == [10, 11, 20]
    assert first.topk_idx is not None
    assert first.topk_weights is not None
    assert first.topk_idx.tolist() == [[0, -1], [1, 0], [0, -1], *[[-1, -1]] * 3]
    assert first.topk_weights[:3].tolist() == [[0.5, 0], [1.0, 2.0], [4.0, 0]]
    assert second.topk_idx is not None
    assert second.topk_idx[:3].tolist() == [[-1, 0], [-1, 1], [0, 1]]


def test_padding_is_not_sent() -> None:
    inputs = two_ranks()
    inputs[0] = replace(inputs[0], num_tokens=1)
    first, _ = reference.dispatch(CONFIG, inputs)
    assert first.x[0, :2, 0].tolist() == [10, 20]
    assert first.num_messages.tolist() == [1, 1]


def test_combine_weighs_what_the_experts_return() -> None:
    inputs = two_ranks()
    outputs = [one.x.float().mul(2).bfloat16() for one in reference.dispatch(CONFIG, inputs)]
    first, second = reference.combine(CONFIG, inputs, outputs)
    assert first.exact[:, 0].tolist() == [20 * 0.75, 22 * 3.0, 0]
    assert second.exact[:, 0].tolist() == [40 * 5.0, 42 * 5.0]
    for exact, ordered in zip(
        (first, second), reference.combine_in_order(CONFIG, inputs, outputs), strict=True
    ):
        assert ((ordered.double() - exact.exact).abs() <= exact.bound).all()


def test_compact_rows_are_taken_as_already_weighted() -> None:
    config = replace(CONFIG, recv_format="compact")
    inputs = two_ranks()
    outputs = [one.x for one in reference.dispatch(config, inputs)]
    first, second = reference.combine(config, inputs, outputs)
    assert first.exact[:, 0].tolist() == [20, 11, 0]  # token 0 went to both ranks
    assert second.exact[:, 0].tolist() == [40, 21]


def test_sums_are_rounded_per_rank_then_at_home() -> None:
    """1 + 2^-8 is no BF16 number: rank 0's sum loses the 2^-8 that one FP32 sum would keep."""
    config = replace(CONFIG, topk=3)
    inputs = [
        RankInput(rows(1), torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2.0**-8, 2.0**-8]])),
        RankInput(rows(), torch.empty(0, 3, dtype=torch.long), torch.empty(0, 3)),
    ]
    outputs = [torch.ones(2, 6, 128).bfloat16() for _ in range(2)]
    assert reference.combine(config, inputs, outputs)[0].exact[0, 0] == 1 + 2.0**-7
    assert reference.combine_in_order(config, inputs, outputs)[0][0, 0] == 1.0


def test_bound_is_about_one_rounding_of_the_sum() -> None:
    inputs = two_ranks()
    outputs = [torch.randn(2, 6, 128).bfloat16() for _ in range(2)]
    for one in reference.combine(CONFIG, inputs, outputs):
        assert (one.bound <= 0.2).all()
        assert (one.bound[one.exact != 0] >= 2.0**-9 * one.exact[one.exact != 0].abs()).all()


@pytest.mark.parametrize(
    ("combine_format", "of_norm", "calc_diff"), [("bf16", 2.4e-3, 2.8e-6), ("fp8", 2.6e-2, 3.3e-4)]
)
def test_rounding_of_normal_rows_is_what_the_documents_say(
    combine_format: Literal["bf16", "fp8"], of_norm: float, calc_diff: float
) -> None:
    """docs/architecture.md: H=7168, K=8, four ranks."""
    rng = torch.Generator().manual_seed(0)
    config = EpConfig(
        num_experts=64, topk=8, hidden=7168, max_tokens=8, combine_format=combine_format
    )
    inputs = []
    for _ in range(4):
        chosen = torch.rand(8, 64, generator=rng).topk(8).indices
        weights = torch.rand(8, 8, generator=rng)
        inputs.append(RankInput(torch.zeros(8, 7168).bfloat16(), chosen, weights))
    shapes = [one.x.shape for one in reference.dispatch(config, inputs)]
    outputs = [torch.randn(shape, generator=rng).bfloat16() for shape in shapes]
    exact = torch.cat([one.exact for one in reference.combine(config, inputs, outputs)])
    got = torch.cat(reference.combine_in_order(config, inputs, outputs)).double()
    assert float((got - exact).norm() / exact.norm()) == pytest.approx(of_norm, rel=0.05)
    square = (got * got + exact * exact).sum()
    assert float(1 - 2 * (got * exact).sum() / square) == pytest.approx(calc_diff, rel=0.05)


def test_impossible_and_repeated_experts_are_counted_and_dropped() -> None:
    one = RankInput(
        rows(1, 2, 3, 4),
        torch.tensor([[4, 0], [1, 1], [-2, -1], [2, 3]]),
        torch.zeros(4, 2),
    )
    routes, bad = reference.clean_routes(replace(CONFIG, max_tokens=4), one)
    assert bad == 3
    assert routes.tolist() == [[-1, 0], [1, -1], [-1, -1], [2, 3]]


def test_quantisation_uses_a_scale_per_128_channels() -> None:
    x = torch.zeros(1, 384).bfloat16()
    x[0, 0], x[0, 128], x[0, 129] = 448.0, -0.5, 0.25
    values, scales = reference.quantize_fp8(x)
    amax = torch.tensor([448.0, 0.5, 1e-4])
    assert torch.equal(scales[0], amax / torch.full((3,), 448.0))
    assert values[0, [0, 128, 129]].float().tolist() == [448.0, -448.0, 224.0]
    assert torch.equal(reference.dequantize_fp8(values, scales)[0, :2], torch.tensor([448.0, 0.0]))


def test_quantisation_error_is_that_of_e4m3() -> None:
    x = torch.randn(50, 512).bfloat16()
    error = (reference.dequantize_fp8(*reference.quantize_fp8(x)) - x.float()).abs()
    amax = x.float().abs().unflatten(-1, (-1, 128)).amax(-1).repeat_interleave(128, -1)
    assert (error <= x.float().abs() / 16 + amax * 2.0**-9 / 448).all()


@pytest.mark.parametrize(
    ("largest", "scale", "value"),
    [(448.0, 1.0, 448.0), (450.0, 2.0, 224.0), (896.0, 2.0, 448.0), (0.5, 2.0**-9, 256.0)],
)
def test_rounded_scales_are_the_next_power_of_two(
    largest: float, scale: float, value: float
) -> None:
    x = torch.zeros(1, 128).bfloat16()
    x[0, 3] = largest
    values, scales = reference.quantize_fp8(x, round_scale=True)
    assert scales.tolist() == [[scale]]
    assert values[0, 3].float() == value
    assert not values[0, :3].float().any()


def test_exponents_lie_four_to_a_word_lowest_group_first() -> None:
    scales = torch.tensor([[1.0, 2.0, 0.5, 4.0, 2.0**-22]])
    words = pack_ue8m0(scales)
    assert words.dtype == torch.int32
    assert words.tolist() == [[(127 | 128 << 8 | 126 << 16 | 129 << 24) - (1 << 32), 105]]
