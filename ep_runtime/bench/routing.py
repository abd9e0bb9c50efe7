"""Inputs of a benchmark: seeded, so every rank and every implementation can make the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ep_runtime.bench.options import Skew

ZIPF_EXPONENT = 1.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What inputs depend on. num_tokens: T of a rank that is not empty."""

    num_ranks: int
    num_tokens: int
    hidden: int
    topk: int
    num_experts: int
    skew: Skew
    seed: int

    def tokens_of(self, rank: int) -> int:
        """T on `rank`: "half-empty" leaves the later half of the ranks without tokens."""
        empty = self.num_ranks // 2 if self.skew == "half-empty" else 0
        return 0 if rank >= self.num_ranks - empty else self.num_tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    """One rank's step: x [T, H] bf16, topk_idx [T, K] int64, topk_weights [T, K] float32."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def to(self, device: torch.device) -> Inputs:
        """A copy on `device`."""
        return Inputs(self.x.to(device), self.topk_idx.to(device), self.topk_weights.to(device))


def make_routes(sizes: Sizes, rank: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, K] int64 (distinct in a row, -1: none) and weights [T, K] of set `index`.

    uniform      every expert alike
    zipf         expert popularity falls as 1 / place, places shuffled by the seed alone
    one-rank     every token chooses experts of rank 0 only
    half-empty   uniform, but the later half of the ranks has no tokens
    """
    generator = _generator(sizes, rank, index, stream=0)
    num_tokens = sizes.tokens_of(rank)
    # The K best of log(popularity) + Gumbel noise are K draws without replacement.
    uniform = torch.rand(num_tokens, sizes.num_experts, generator=generator, dtype=torch.float64)
    scores = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    scores += _log_popularity(sizes)
    best = scores.topk(min(sizes.topk, sizes.num_experts), dim=-1)
    idx = torch.where(best.values == -torch.inf, -1, best.indices)
    weights = torch.rand(num_tokens, sizes.topk, generator=generator) + 0.05
    return idx, weights / weights.sum(dim=-1, keepdim=True)


def make_inputs(sizes: Sizes, rank: int, index: int) -> Inputs:
    """Input set `index` of `rank`, on the CPU. Rows differ in scale by orders of magnitude."""
    idx, weights = make_routes(sizes, rank, index)
    generator = _generator(sizes, rank, index, stream=1)
    shape = (sizes.tokens_of(rank), sizes.hidden)
    scale = torch.exp(torch.randn(shape[0], 1, generator=generator))
    x = torch.randn(shape, generator=generator) * scale
    return Inputs(x.to(torch.bfloat16), idx, weights)


def _log_popularity(sizes: Sizes) -> torch.Tensor:
    popularity = torch.ones(sizes.num_experts, dtype=torch.float64)
    if sizes.skew == "zipf":
        order = torch.randperm(
            sizes.num_experts, generator=torch.Generator().manual_seed(sizes.seed)
        )
        places = torch.arange(1, sizes.num_experts + 1, dtype=torch.float64)
        popularity[order] = places**-ZIPF_EXPONENT
    elif sizes.skew == "one-rank":
        popularity[sizes.num_experts // sizes.num_ranks :] = 0
    return popularity.log()


def _generator(sizes: Sizes, rank: int, index: int, stream: int) -> torch.Generator:
    """A generator of its own for every (seed, T, rank, set, stream).

    Hashed, because torch's CPU generator looks at the low 32 bits of a seed alone.
    """
    name = f"{sizes.seed}/{sizes.num_tokens}/{rank}/{index}/{stream}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
