"""`contiguous`: a grouped GEMM over rows sorted by expert, as DeepGEMM's contiguous kernels do it.

python -m examples.experts.contiguous --ranks 2 --format fp8
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


class ContiguousExperts:
    """Expert e's rows begin at expert_offset[e], a multiple of the alignment, so a tile of the GEMM
    belongs to one expert. Raises ConfigError for an alignment that a tile does not divide."""

    def __init__(self, weights: ExpertWeights, config: EpConfig, num_ranks: int) -> None:
        check_weights(weights, config, num_ranks, "contiguous")
        if config.alignment % ROW_TILE:
            raise ConfigError(
                f"alignment={config.alignment}: tiles have {ROW_TILE} rows of one expert; make it"
                f" a multiple of {ROW_TILE}"
            )
        device = weights.gate.device
        rows = config.recv_rows(num_ranks)
        self.kernels = kernels_for(device)
        self._weights = weights
        self._topk = config.topk
        self._h = torch.empty(rows, weights.inner, dtype=torch.bfloat16, device=device)
        self._y = torch.empty(rows, config.hidden, dtype=torch.bfloat16, device=device)

    def __call__(self, received: Received) -> torch.Tensor:
        """y [rows, H]; combine applies the weights."""
        if received.expert_offset is None:
            raise ConfigError("rows without expert_offset; build the Buffer with 'contiguous'")
        groups = Groups(received.expert_offset, received.recv_count, 0, None, self._topk)
        self.kernels.gate_up(received.x, received.scales, groups, self._weights, self._h)
        self.kernels.down(self._h, groups, self._weights, self._y)
        return self._y

    def workspace(self) -> list[torch.Tensor]:
        return [self._h, self._y]


if __name__ == "__main__":
    from examples.experts.run import main

    raise SystemExit(main("contiguous"))
