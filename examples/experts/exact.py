"""The same layer on one rank, in FP64: what every rank's tokens must come back as."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.reference import dequantize_fp8, quantize_fp8
from examples.experts.parts import ExpertWeights

# Of the sum of the experts' contributions, in the norm over a token's channels. Rounded to BF16 are
# h, an expert's result, a rank's sum and the whole: 2e-3 each at most, less in the norm.
ERROR_LIMIT = 8e-3


@dataclass(frozen=True, slots=True)
class Exact:
    """out [T, H] float64; size [T] float64: the norms of the weighted experts' results, added."""

    out: torch.Tensor
    size: torch.Tensor

    def error(self, got: torch.Tensor) -> float:
        """The largest error of a token, as a part of its size. Infinite for a NaN, and where a
        token without experts did not come back as zeros."""
        if got.shape != self.out.shape or not bool(got.isfinite().all()):
            return float("inf")
        if not len(got):
            return 0.0
        apart = torch.linalg.vector_norm(got.double().cpu() - self.out, dim=-1)
        return float(torch.where(apart == 0, 0.0, apart / self.size).max())


def exact_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    dispatch_format: str,
) -> Exact:
    """x [T, H] bf16, topk_idx [T, K] (-1: none), topk_weights [T, K]; `weights` of all experts, in
    the order of their numbers. CPU tensors."""
    rows = (dequantize_fp8(*quantize_fp8(x)) if dispatch_format == "fp8" else x).double()
    out, size = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64)
    for expert in range(len(weights.gate)):
        token, k = (topk_idx == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        mine = rows[token]
        gate = mine @ weights.gate[expert].double().T
        inner = gate * gate.sigmoid() * (mine @ weights.up[expert].double().T)
        term = inner @ weights.down[expert].double().T
        term *= topk_weights[token, k].double().unsqueeze(-1)
        out.index_add_(0, token, term)
        size.index_add_(0, token, torch.linalg.vector_norm(term, dim=-1))
    return Exact(out, size)


def random_weights(rng: torch.Generator, experts: int, hidden: int, inner: int) -> ExpertWeights:
    """Weights of `experts` experts on the CPU; results are about as large as inputs."""
    gate, up, down = (
        torch.randn(shape, generator=rng) * shape[-1] ** -0.5
        for shape in ((experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner))
    )
    return ExpertWeights(gate.bfloat16(), up.bfloat16(), down.bfloat16())


def share_of(
    weights: ExpertWeights, rank: int, num_ranks: int, device: torch.device
) -> ExpertWeights:
    """The experts of one rank, on its device."""
    local = len(weights.gate) // num_ranks
    mine = slice(rank * local, (rank + 1) * local)
    return ExpertWeights(
        *(w[mine].to(device).contiguous() for w in (weights.gate, weights.up, weights.down))
    )
