"""`batched`: a masked grouped GEMM over [L, R*M, H], as DeepGEMM's masked kernels do it.

python -m examples.experts.batched --ranks 2 --format fp8
"""

from __future__ import annotations

import torch

from ep_runtime import EpConfig
from ep_runtime.handles import Received
from examples.experts.parts import ExpertWeights, Groups, check_weights, kernels_for


class BatchedExperts:
    """Every expert has R*M rows, of which the first recv_count[e] are multiplied."""

    def __init__(self, weights: ExpertWeights, config: EpConfig, num_ranks: int) -> None:
        check_weights(weights, config, num_ranks, "batched")
        device = weights.gate.device
        local, rows = config.local_experts(num_ranks), config.recv_rows(num_ranks)
        self.kernels = kernels_for(device)
        self._weights = weights
        self._rows, self._topk = rows, config.topk
        self._first = torch.arange(local + 1, dtype=torch.int32, device=device) * rows
        self._h = torch.empty(local * rows, weights.inner, dtype=torch.bfloat16, device=device)
        self._y = torch.empty(local, rows, config.hidden, dtype=torch.bfloat16, device=device)

    def __call__(self, received: Received) -> torch.Tensor:
        """y [L, R*M, H]; combine applies the weights."""
        groups = Groups(self._first, received.recv_count, self._rows, None, self._topk)
        scales = None if received.scales is None else received.scales.flatten(0, 1)
        x, y = received.x.flatten(0, 1), self._y.flatten(0, 1)  # views
        self.kernels.gate_up(x, scales, groups, self._weights, self._h)
        self.kernels.down(self._h, groups, self._weights, y)
        return self._y

    def workspace(self) -> list[torch.Tensor]:
        return [self._h, self._y]


if __name__ == "__main__":
    from examples.experts.run import main

    raise SystemExit(main("batched"))
