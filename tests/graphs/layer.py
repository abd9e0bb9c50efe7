"""The simplest layer over a group: dispatch, experts, combine."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from cases import beyond_one_ulp, draw_case, expert_factors, run_experts
from steps import Tensors

from ep_runtime import Buffer, EpConfig

CONFIG = EpConfig(num_experts=6, topk=2, hidden=128, max_tokens=8)


class Layer:
    """Dispatch, experts, combine on all ranks; counts how often it ran."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = list(buffers)
        self.factors = expert_factors(buffers[0].config).view(buffers[0].num_ranks, -1)
        self.runs = 0
        self.chain = 0

    def __call__(
        self, inputs: list[Tensors], num_tokens: Sequence[torch.Tensor | None]
    ) -> list[Tensors]:
        self.runs += 1
        sent = [
            b.dispatch(i["x"], i["idx"], i["weights"], chain=self.chain, num_tokens=n)
            for b, i, n in zip(self.buffers, inputs, num_tokens, strict=True)
        ]
        received = [pending.wait() for pending in sent]
        back = [
            b.combine(run_experts(r.x, r.scales, self.factors[b.rank]), r.handle)
            for b, r in zip(self.buffers, received, strict=True)
        ]
        return [{"out": pending.wait()} for pending in back]


def empty_inputs(rows: int) -> Tensors:
    return {
        "x": torch.zeros((rows, CONFIG.hidden), dtype=torch.bfloat16),
        "idx": torch.full((rows, CONFIG.topk), -1),
        "weights": torch.zeros((rows, CONFIG.topk)),
    }


def random_step(counts: tuple[int, ...]) -> tuple[list[Tensors], list[torch.Tensor]]:
    """Inputs of all ranks and what must come home."""
    case = draw_case(CONFIG, counts, random.randrange(1 << 40))
    inputs = [{"x": r.x, "idx": r.topk_idx, "weights": r.topk_weights} for r in case]
    return inputs, [r.out for r in case]


def require_right(outputs: list[Tensors], wanted: list[torch.Tensor]) -> None:
    for found, expected in zip(outputs, wanted, strict=True):
        assert found["out"].shape == expected.shape
        assert beyond_one_ulp(found["out"], expected) == 0
