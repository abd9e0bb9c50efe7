"""Random batches of a whole group with their results worked out beforehand by the torch reference.

A case is used many times, each time multiplied by another power of two: exact in BF16 and FP8
scales, so that expectations need no second computation and stale rows of an earlier use differ.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from support import raw, ulps_apart

from ep_runtime import EpConfig, reference
from ep_runtime.reference import RankInput

EXPONENTS = range(-3, 4)
Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankCase:
    """One rank's share: what it dispatches, what it receives, what comes home."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    rows: torch.Tensor
    scales: torch.Tensor | None
    valid: torch.Tensor
    recv_count: torch.Tensor
    num_messages: torch.Tensor
    source_token: torch.Tensor
    layout_range: torch.Tensor
    out: torch.Tensor

    def to(self, device: torch.device) -> RankCase:
        moved: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            moved[name] = None if value is None else value.to(device)
        return RankCase(**moved)


def expert_factors(config: EpConfig) -> torch.Tensor:
    """[E] powers of two: what each expert multiplies its rows by."""
    return torch.tensor([2.0 ** (expert % 5 - 2) for expert in range(config.num_experts)])


def run_experts(
    x: torch.Tensor, scales: torch.Tensor | None, factors: torch.Tensor
) -> torch.Tensor:
    """[L, rows, H] received -> [L, rows, H] bf16; factors [L]."""
    values = x.float()
    if scales is not None:
        values = (values.view(*scales.shape, -1) * scales[..., None]).flatten(-2)
    return (values * factors[:, None, None]).bfloat16()


def draw_counts(rng: random.Random, num_ranks: int, max_tokens: int) -> Counts:
    """Tokens per rank: none, few, many or all."""
    choices = [0, 1, max_tokens, rng.randint(0, max_tokens), rng.randint(0, max_tokens // 4)]
    return tuple(rng.choice(choices) for _ in range(num_ranks))


def draw_case(config: EpConfig, counts: Counts, seed: int) -> list[RankCase]:
    """A case for all ranks on the CPU. Some tokens have fewer than K experts, some none."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [_draw_input(config, count, generator) for count in counts]
    received = reference.dispatch(config, inputs)
    experts = config.local_experts(len(counts))
    factors = expert_factors(config).view(len(counts), experts)
    outputs = [run_experts(e.x, e.scales, f) for e, f in zip(received, factors, strict=True)]
    home = reference.combine_in_order(config, inputs, outputs)
    return [
        RankCase(
            one.x, one.topk_idx, one.topk_weights,
            e.x, e.scales, e.valid, e.recv_count, e.num_messages, e.source_token, e.layout_range,
            out,
        )
        for one, e, out in zip(inputs, received, home, strict=True)
    ]  # fmt: skip


def _draw_input(config: EpConfig, count: int, generator: torch.Generator) -> RankInput:
    x = torch.randn((count, config.hidden), generator=generator).bfloat16()
    scores = torch.rand((count, config.num_experts), generator=generator)
    topk_idx = scores.topk(config.topk, dim=1).indices
    absent = torch.rand((count, config.topk), generator=generator) < 0.2
    alone = torch.rand((count, 1), generator=generator) < 0.1
    topk_idx = topk_idx.masked_fill(absent | alone, -1)
    weights = torch.rand((count, config.topk), generator=generator)
    return RankInput(x, topk_idx, weights)


def rows_differ(found: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """How many valid rows differ in any bit: a scalar on the device."""
    return ((raw(found) != raw(wanted)).any(-1) & valid).sum()


def beyond_one_ulp(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many BF16 values are more than one unit in the last place off (NaN included)."""
    return ((ulps_apart(found, wanted) > 1) | found.isnan()).sum()
