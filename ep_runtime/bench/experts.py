"""Stand-in experts that betray every misrouted row, and the exact answer to compare with.

Expert e multiplies a row by `gain[e]`, one random factor from 1 to 4 per 128 channels. A row that
reached the wrong expert, or met the wrong weight, is then far off in some group of 128 channels,
while a right one is off by rounding alone. All factors are positive, so nothing cancels.
"""

from __future__ import annotations

import torch

from ep_runtime.bench.routing import Inputs
from ep_runtime.reference import SCALE_GROUP, quantize_fp8

GAIN_SEED = 20


def gains(num_experts: int, hidden: int) -> torch.Tensor:
    """gain [E, H / 128] float32, the same on every rank."""
    generator = torch.Generator().manual_seed(GAIN_SEED)
    return 1.0 + 3.0 * torch.rand(num_experts, hidden // SCALE_GROUP, generator=generator)


def dequantise(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """float32 rows [..., H]; `scales` None: the values are the rows."""
    rows = values.float()
    if scales is None:
        return rows
    return amplify(rows, scales)


def amplify(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """rows [..., H] times factors [..., H / 128]."""
    return (grouped(rows) * factors.unsqueeze(-1)).flatten(-2)


def grouped(rows: torch.Tensor) -> torch.Tensor:
    """[..., H] as [..., H / 128, 128]."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // SCALE_GROUP, SCALE_GROUP)


def weighted_gain(
    gain: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """sum over k of weight * gain[expert], [..., H / 128]; experts below zero count nothing.

    `gain` [L, H / 128] may be a rank's own part when `topk_idx` holds local experts.
    """
    weights = torch.where(topk_idx >= 0, topk_weights, 0).to(gain.dtype)
    chosen = gain[topk_idx.clamp(min=0).long()]
    return (chosen * weights.unsqueeze(-1)).sum(dim=-2)


def local_experts(topk_idx: torch.Tensor, rank: int, num_local: int) -> torch.Tensor:
    """Global experts as numbers of `rank`'s own, -1 for those of other ranks."""
    local = topk_idx - rank * num_local
    return torch.where((local >= 0) & (local < num_local), local, -1)


def expected_output(inputs: Inputs, num_experts: int, dispatch_format: str) -> torch.Tensor:
    """What combine must return for `inputs` [T, H], in float64 on their device."""
    x = inputs.x
    rows = dequantise(*quantize_fp8(x)) if dispatch_format == "fp8" else x
    gain = gains(num_experts, x.shape[-1]).to(x.device, torch.float64)
    return amplify(rows.double(), weighted_gain(gain, inputs.topk_idx, inputs.topk_weights))


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest ||out - expected|| / ||expected|| over tokens and groups of 128 channels.

    Any NaN or infinity makes it infinite; no tokens make it 0.
    """
    if out.shape != expected.shape:
        return float("inf")
    if out.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(grouped(out.double() - expected), dim=-1)
    size = torch.linalg.vector_norm(grouped(expected), dim=-1)
    error = difference / size.clamp(min=1e-30)
    return float(error.max()) if bool(error.isfinite().all()) else float("inf")
