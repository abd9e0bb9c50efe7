"""Random tokens of a whole group, and what becomes of them in FP64. Plain torch, CPU tensors.

Every rank draws the inputs of all ranks from the same seed, so it knows what must arrive.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

E4M3_MAX = 448.0
GROUP = 128


@dataclass(frozen=True)
class Tokens:
    """What one rank sends: x bf16 [T, H], topk_idx int64 [T, K], weights float32 [T, K]."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor

    def on(self, device: torch.device) -> Tokens:
        return Tokens(self.x.to(device), self.topk_idx.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Sizes:
    num_experts: int
    topk: int
    hidden: int
    max_tokens: int


def draw(seed: int, sizes: Sizes, num_ranks: int, *, full: bool = False) -> list[Tokens]:
    """Tokens of every rank: uneven numbers, with an empty and a full rank by chance; some entries
    -1, some tokens without any expert. full: max_tokens everywhere."""
    rng = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(num_ranks):
        some = int(torch.randint(sizes.max_tokens + 1, (), generator=rng))
        choices = [0, sizes.max_tokens, 1, some]
        rows = sizes.max_tokens if full else choices[int(torch.randint(4, (), generator=rng))]
        x = torch.randn((rows, sizes.hidden), generator=rng)
        x *= torch.exp2(torch.randint(-3, 3, (rows, 1), generator=rng).float())
        idx = torch.rand((rows, sizes.num_experts), generator=rng).argsort(1)[:, : sizes.topk]
        idx = idx.contiguous()
        idx[torch.rand(idx.shape, generator=rng) < 0.1] = -1
        idx[torch.rand((rows,), generator=rng) < 0.1] = -1
        weights = torch.rand((rows, sizes.topk), generator=rng)
        drawn.append(Tokens(x.bfloat16(), idx, weights))
    return drawn


def without(everyone: list[Tokens], sizes: Sizes, masked: Collection[int]) -> list[Tokens]:
    """The tokens as they count where some ranks are masked."""
    owner_size = sizes.num_experts // len(everyone)
    counted = []
    for rank, tokens in enumerate(everyone):
        idx = tokens.topk_idx.clone()
        for peer in masked:
            idx[idx // owner_size == peer] = -1
        end = 0 if rank in masked else len(idx)
        counted.append(Tokens(tokens.x[:end], idx[:end], tokens.weights[:end]))
    return counted


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2<x,y> / (<x,x> + <y,y>) of values shifted by one: DeepEP's measure."""
    if x.numel() == 0:
        return 0.0
    a, b = x.double().cpu() + 1, y.double().cpu() + 1
    return 1 - 2 * float((a * b).sum() / (a * a + b * b).sum())


def quantise(x: torch.Tensor, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H] -> (e4m3 [T, H], scales float64 [T, H/128]); scales are powers of two if rounded."""
    groups = x.double().view(x.shape[0], x.shape[1] // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / E4M3_MAX
    if round_scale:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    values = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
    return values.view(x.shape), scale.squeeze(-1)


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 [..., H] from e4m3 and scales as dispatch returned them (float32, or packed)."""
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    return values.double() * scales.double().repeat_interleave(GROUP, -1)


def unpack_ue8m0(packed: torch.Tensor) -> torch.Tensor:
    """[..., G/4] int32 -> [..., G] float64: four exponents in each, the first in the low byte."""
    words = packed.contiguous()[..., None].bitwise_right_shift(
        torch.tensor([0, 8, 16, 24], device=packed.device)
    )
    return torch.exp2((words & 0xFF).double() - 127).flatten(-2)


def gain_of(expert: int) -> float:
    """What an expert does to a row: a power of two, so that BF16 holds the result exactly."""
    return 2.0 ** (expert % 4 - 1)


def weighted(tokens: Tokens, weights: torch.Tensor) -> torch.Tensor:
    """FP64 [T, H] of a low-latency round trip: sum over k of weight * gain(expert) * x."""
    result = torch.zeros(tokens.x.shape, dtype=torch.float64)
    for k in range(tokens.topk_idx.shape[1]):
        for token, expert in enumerate(tokens.topk_idx[:, k].tolist()):
            if expert >= 0:
                factor = float(weights[token, k]) * gain_of(expert)
                result[token] += factor * tokens.x[token].double()
    return result


def going_to(tokens: Tokens, first: int, experts: int) -> torch.Tensor:
    """Indices of the tokens with an expert in [first, first + experts)."""
    chosen = (tokens.topk_idx >= first) & (tokens.topk_idx < first + experts)
    return chosen.any(1).nonzero().flatten()
