"""A small group, and a dispatch that it takes, to be spoiled one argument at a time."""

from __future__ import annotations

from typing import Any

import torch

from ep_runtime import Buffer, EpConfig

CONFIG = EpConfig(num_experts=8, topk=4, hidden=256, max_tokens=16)
ROWS = 5


def arguments() -> dict[str, Any]:
    """What a good dispatch takes."""
    return {
        "x": torch.zeros(ROWS, 256, dtype=torch.bfloat16),
        "topk_idx": torch.full((ROWS, 4), -1),
        "topk_weights": torch.zeros(ROWS, 4),
    }


def dispatch(buffer: Buffer, **changes: Any) -> Any:
    given = {**arguments(), **changes}
    return buffer.dispatch(
        given.pop("x"), given.pop("topk_idx"), given.pop("topk_weights"), **given
    )


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)
