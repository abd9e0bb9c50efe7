"""The single-rank reference: against formulas written out in float64, one token at a time."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ep_runtime.lm import checkpoint, train
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.model import LanguageModel, Layer, route

CONFIG = LmConfig(
    layers=2, hidden=128, heads=2, num_experts=8, topk=3, inner=16, shared_inner=32, max_context=32
)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + CONFIG.norm_eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def turn(x: Tensor, position: int) -> Tensor:
    """One head, pair (i, i + d/2) rotated by position / base^(2i/d)."""
    half = x.numel() // 2
    out = x.clone()
    for i in range(half):
        angle = position / CONFIG.rope_base ** (i / half)
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    inner = gate_up.shape[0] // 2
    return down @ (silu(gate_up[:inner] @ x) * (gate_up[inner:] @ x))


def logits_by_hand(model: LanguageModel, tokens: list[int]) -> Tensor:
    """[S, 256] float64: token by token, head by head, expert by expert, with growing caches."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    keys: list[list[Tensor]] = [[] for _ in range(c.layers)]
    values: list[list[Tensor]] = [[] for _ in range(c.layers)]
    rows = []
    for position, token in enumerate(tokens):
        x = w["embedding"][token].clone()
        for i in range(c.layers):
            p = f"layers.{i}."
            h = norm(x, w[p + "attention_norm"])
            q, k, v = (w[p + "qkv"] @ h).view(3, c.heads, c.head_dim)
            keys[i].append(torch.stack([turn(head, position) for head in k]))
            values[i].append(v)
            heads = []
            for n in range(c.heads):
                score = torch.stack([key[n] @ turn(q[n], position) for key in keys[i]])
                share = (score / math.sqrt(c.head_dim)).softmax(0)
                heads.append(sum(s * val[n] for s, val in zip(share, values[i], strict=True)))
            x = x + w[p + "attention_out"] @ torch.cat(heads)
            h = norm(x, w[p + "moe_norm"])
            probability = (w[p + "router"] @ h).softmax(0)
            chosen = sorted(range(c.num_experts), key=lambda e: -probability[e].item())[: c.topk]
            total = sum(probability[e] for e in chosen)
            out = expert(h, w[p + "shared_gate_up"], w[p + "shared_down"])
            for e in chosen:
                mine = expert(h, w[p + "gate_up"][e], w[p + "down"][e])
                out = out + probability[e] / total * mine
            x = x + out
        rows.append(w["embedding"] @ norm(x, w["final_norm"]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_forward_equals_the_formulas(seed: int) -> None:
    model = checkpoint.random(CONFIG, seed).reference()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0, generator=generator)
    tokens = torch.randint(256, (2, 12), generator=generator)
    logits, _ = model(tokens)
    for row, got in zip(tokens.tolist(), logits, strict=True):
        torch.testing.assert_close(got.double(), logits_by_hand(model, row), atol=2e-4, rtol=1e-4)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = checkpoint.random(CONFIG).reference()
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 11:] = (changed[0, 11:] + 1) % 256
    torch.testing.assert_close(model(tokens)[0][:, :11], model(changed)[0][:, :11])


def test_route_gives_distinct_experts_and_weights_that_sum_to_one() -> None:
    x, router = torch.randn(50, 128), torch.randn(8, 128)
    index, weights, _ = route(x, router, 3)
    assert all(len(set(row)) == 3 for row in index.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert weights.dtype == torch.float32


def test_balance_is_one_for_equal_use_and_more_otherwise() -> None:
    model = LanguageModel(CONFIG)
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    x = torch.randn(4000, CONFIG.hidden)
    layer.router.data.normal_(std=1e-3)
    assert model.moe(layer, x)[1].item() == pytest.approx(1.0, abs=0.02)
    layer.router.data[:3] += 0.5
    x = x.abs()
    assert model.moe(layer, x)[1].item() > 2


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    data = torch.frombuffer(bytearray(b"the cat sat on the mat. " * 200), dtype=torch.uint8)
    before = train.bits_per_byte(model, data, 8, limit=4)
    arguments = train.parse(["--steps", "30", "--batch", "4", "--lr", "3e-3", "--val-windows", "2"])
    train.optimize(model, data, data, arguments)
    assert train.bits_per_byte(model, data, 8, limit=4) < before / 2


def test_learning_rate_warms_up_and_ends_low() -> None:
    rates = [train.learning_rate(i / 1000, 1.0) for i in range(1001)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.02)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_training_needs_no_native_module() -> None:
    code = (
        "import sys; sys.modules['ep_runtime._C'] = None; "
        "import ep_runtime.lm.train, ep_runtime.lm.corpus"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
