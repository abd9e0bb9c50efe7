"""`compact`: a fused MoE that gathers rows, as vLLM's and SGLang's Triton kernels do it.

    python -m examples.experts.compact --ranks 2 --format fp8

A message arrives as one row with the local experts that it is for, so a row that four experts want
is received once. The experts apply the weights and add up their results: one row per message.
"""

from __future__ import annotations

import torch

from ep_runtime import EpConfig
from ep_runtime.errors import ConfigError
from ep_runtime.handles import Received
from examples.experts.parts import (
    ROW_TILE,
    ExpertWeights,
    Groups,
    check_weights,
    kernels_for,
)


class CompactExperts:
    """Sort the choices by expert, gather rows into the GEMM, scatter weighted rows, add them."""

    def __init__(self, weights: ExpertWeights, config: EpConfig, num_ranks: int) -> None:
        check_weights(weights, config, num_ranks, "compact")
        device = weights.gate.device
        local, rows = config.local_experts(num_ranks), config.recv_rows(num_ranks)
        slots = rows * min(config.topk, local) + local * (ROW_TILE - 1)
        self.kernels = kernels_for(device)
        self._weights = weights
        self._topk = config.topk
        self._first = torch.empty(local + 1, dtype=torch.int32, device=device)
        self._cursor = torch.empty(local, dtype=torch.int32, device=device)
        self._pairs = torch.empty(slots, dtype=torch.int32, device=device)
        self._h = torch.empty(slots, weights.inner, dtype=torch.bfloat16, device=device)
        self._terms = torch.empty(rows * config.topk, config.hidden, device=device)
        self._y = torch.empty(rows, config.hidden, dtype=torch.bfloat16, device=device)

    def __call__(self, received: Received) -> torch.Tensor:
        """y [R*M, H]: one row per message, already weighted."""
        topk_idx, topk_weights = received.topk_idx, received.topk_weights
        if topk_idx is None or topk_weights is None:
            raise ConfigError("rows without topk_idx; build the Buffer with 'compact'")
        kernels, weights = self.kernels, self._weights
        kernels.sort(topk_idx, received.recv_count, self._first, self._cursor, self._pairs)
        groups = Groups(self._first, received.recv_count, 0, self._pairs, self._topk)
        kernels.gate_up(received.x, received.scales, groups, weights, self._h)
        kernels.down_weighted(self._h, groups, weights, topk_weights, self._terms)
        kernels.sum_terms(self._terms, topk_idx, received.num_messages, self._y)
        return self._y

    def workspace(self) -> list[torch.Tensor]:
        return [self._first, self._cursor, self._pairs, self._h, self._terms, self._y]


if __name__ == "__main__":
    from examples.experts.run import main

    raise SystemExit(main("compact"))
