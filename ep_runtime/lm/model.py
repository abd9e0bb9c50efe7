"""The language model on one rank: used for training, and as the reference for `decode --check`.

Every routed expert is computed for every token and masked by the routing weights: for experts this
small that is faster than gathering, and it shares no code with the expert-parallel path it judges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_runtime.lm.config import VOCAB, LmConfig


def rope_table(config: LmConfig) -> Tensor:
    """[max_context, head_dim / 2, 2] float32: cosine and sine per position and channel pair."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.max_context, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding. x [..., heads, head_dim]; table [..., head_dim / 2, 2] of x's positions."""
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H] float32 in, float32 out."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(x: Tensor, router: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The router, in float32. x [T, H], router [E, H].

    Returns topk_idx [T, K] int64, topk_weights [T, K] float32 that sum to 1, and the probabilities
    [T, E] over all experts (for the balancing loss).
    """
    with torch.autocast(x.device.type, enabled=False):
        probabilities = F.linear(x.float(), router.float()).softmax(dim=-1)
    weights, index = probabilities.topk(topk, dim=-1)
    return index, weights / weights.sum(dim=-1, keepdim=True), probabilities


class Layer(nn.Module):
    """Weights of one layer. Linear weights are [out, in]; experts are stacked in dimension 0."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        c, h = config, config.hidden

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * scale * shape[-1] ** -0.5)

        into_residual = (2 * c.layers) ** -0.5
        self.attention_norm = nn.Parameter(torch.ones(h))
        self.qkv = weight(3 * h, h)
        self.attention_out = weight(h, h, scale=into_residual)
        self.moe_norm = nn.Parameter(torch.ones(h))
        self.router = weight(c.num_experts, h)
        self.gate_up = weight(c.num_experts, 2 * c.inner, h)
        self.down = weight(c.num_experts, h, c.inner, scale=into_residual)
        self.shared_gate_up = weight(2 * c.shared_inner, h)
        self.shared_down = weight(h, c.shared_inner, scale=into_residual)


class LanguageModel(nn.Module):
    """Token ids [B, S] int64 -> logits [B, S, 256] float32; S at most `config.max_context`."""

    rope: Tensor

    def __init__(self, config: LmConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embedding = nn.Parameter(torch.randn(VOCAB, config.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden))
        self.register_buffer("rope", rope_table(config), persistent=False)

    def attention(self, layer: Layer, x: Tensor) -> Tensor:
        """[B, S, H] normalised -> [B, S, H]; causal."""
        c, (batch, length, _) = self.config, x.shape
        qkv = F.linear(x, layer.qkv).view(batch, length, 3, c.heads, c.head_dim)
        q, k, v = qkv.unbind(dim=2)
        q, k = rotate(q, self.rope[:length]), rotate(k, self.rope[:length])
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return F.linear(out.transpose(1, 2).reshape(batch, length, c.hidden), layer.attention_out)

    def moe(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] normalised -> [T, H] and the balancing loss (1 when experts are equally used)."""
        c = self.config
        index, weights, probabilities = route(x, layer.router, c.topk)
        mask = torch.zeros_like(probabilities).scatter(1, index, weights)
        gate_up = F.linear(x, layer.gate_up.flatten(0, 1)).view(-1, c.num_experts, 2 * c.inner)
        act = swiglu(gate_up) * mask.to(gate_up.dtype)[..., None]
        routed = F.linear(act.flatten(1), layer.down.transpose(0, 1).flatten(1))
        shared = F.linear(swiglu(F.linear(x, layer.shared_gate_up)), layer.shared_down)
        used = (mask > 0).float().mean(dim=0) * (c.num_experts / c.topk)
        return routed + shared, (used * probabilities.mean(dim=0)).sum()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the balancing loss averaged over layers."""
        eps = self.config.norm_eps
        x = F.embedding(tokens, self.embedding).float()
        balance = torch.zeros((), device=x.device)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            attended = self.attention(layer, rms_norm(x, layer.attention_norm, eps))
            x = x + F.dropout(attended, self.dropout, self.training)
            normed = rms_norm(x, layer.moe_norm, eps)
            moe, loss = self.moe(layer, normed.flatten(0, 1))
            x = x + F.dropout(moe.view_as(x), self.dropout, self.training)
            balance = balance + loss / len(self.layers)
        logits = F.linear(rms_norm(x, self.final_norm, eps), self.embedding)
        return logits.float(), balance
