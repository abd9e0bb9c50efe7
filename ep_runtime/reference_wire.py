"""How rows travel, in plain torch: BF16, FP8 with its kinds of scales, opaque. CPU tensors."""

from __future__ import annotations

import torch

from ep_runtime.config import EpConfig

SCALE_GROUP = 128
FP8_MAX = 448.0
MIN_AMAX = 1e-4
MIN_SUM_AMAX = 1e-30
EXPONENTS_PER_WORD = 4
FLOAT_MANTISSA_BITS = 23


def quantize_fp8(x: torch.Tensor, round_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., H] bf16 -> ([..., H] float8_e4m3fn, [..., H/128] float32), value = q * scale.

    round_scale: scales are the next powers of two that are no smaller.
    """
    groups = x.float().unflatten(-1, (-1, SCALE_GROUP))  # type: ignore[no-untyped-call]
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(MIN_AMAX)
    if round_scale:
        scale = _next_power_of_two(amax.double() / FP8_MAX).float()
        values = (groups.double() / scale.double()).to(torch.float8_e4m3fn)
        return values.flatten(-2), scale.squeeze(-1)
    # Tensor by tensor: torch divides by (or into) a Python number through a reciprocal.
    most = torch.full_like(amax, FP8_MAX)
    values = (groups * (most / amax)).to(torch.float8_e4m3fn)
    return values.flatten(-2), (amax / most).squeeze(-1)


def quantize_sums(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., H] float32 -> ([..., H] float8_e4m3fn, [..., H/128] float32), as FP8 combines do."""
    groups = sums.unflatten(-1, (-1, SCALE_GROUP))  # type: ignore[no-untyped-call]
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(MIN_SUM_AMAX)
    most = torch.full_like(amax, FP8_MAX)
    values = (groups * (most / amax)).to(torch.float8_e4m3fn)
    return values.flatten(-2), (amax / most).squeeze(-1)


def _next_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least x, for x > 0."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def dequantize_fp8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse, in float32."""
    return values.float() * scales.repeat_interleave(SCALE_GROUP, dim=-1)


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """[..., G] float32 powers of two -> [..., ceil(G/4)] int32: byte j of word i is the biased
    exponent of scale 4*i + j, 0 beyond the last.
    """
    exponents = scales.contiguous().view(torch.int32) >> FLOAT_MANTISSA_BITS
    missing = -exponents.shape[-1] % EXPONENTS_PER_WORD
    padded = torch.nn.functional.pad(exponents, (0, missing)).to(torch.uint8)
    return padded.contiguous().view(torch.int32)


def wire_rows(
    config: EpConfig, rows: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows given to a dispatch -> rows and scales as `Received` has them, one row for each."""
    if config.dispatch_format == "bf16":
        return rows, None
    if config.dispatch_format == "opaque":
        given = None if scales is None else scales.contiguous().view(torch.int32)
        return rows.contiguous().view(torch.uint8), given
    packed = config.scale_format == "ue8m0"
    values, exact = quantize_fp8(rows, config.round_scale or packed)
    return values, pack_ue8m0(exact) if packed else exact
