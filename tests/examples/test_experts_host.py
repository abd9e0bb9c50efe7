"""The example layers on CPU ranks, and the checks that they are judged by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_layers import INNER, LayerGroup, config_of, layer_inputs
from support import new_rng

from ep_runtime.errors import ConfigError
from examples.experts.batched import BatchedExperts
from examples.experts.contiguous import ContiguousExperts
from examples.experts.exact import ERROR_LIMIT, exact_layer, random_weights
from examples.experts.parts import ExpertWeights

CHECKOUT = Path(__file__).resolve().parents[2]
FORMATS = ("batched", "contiguous", "compact")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("wire", ["fp8", "bf16"])
@pytest.mark.parametrize("recv_format", FORMATS)
def test_the_layer_matches_fp64(recv_format: str, wire: str, num_ranks: int) -> None:
    rng = new_rng()
    group = LayerGroup(rng, config_of(recv_format, wire, num_ranks), num_ranks, "host", INNER)
    for _ in range(3):
        inputs = layer_inputs(rng, group.config, num_ranks)
        group.poison()
        group.check(inputs, group.layer(group.on_device(inputs)))
    group.close()


@pytest.mark.parametrize("recv_format", FORMATS)
def test_replays_of_two_buckets_match_fp64(recv_format: str) -> None:
    rng = new_rng()
    group = LayerGroup(rng, config_of(recv_format, "fp8", 2), 2, "host", INNER)
    group.check_replays(rng, turns=2)
    group.close()


@pytest.mark.parametrize("recv_format", FORMATS)
def test_the_command_runs_eagerly_and_from_graphs_and_says_which_kernels(recv_format: str) -> None:
    command = [sys.executable, "-m", f"examples.experts.{recv_format}", "--backend", "host"]
    command += ["--format", "fp8", "--hidden", "128", "--inner", "64", "--tokens", "7"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch, on the CPU" in done.stdout
    assert done.stdout.strip().endswith("right")


def layer_of_one_token() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]:
    rng = new_rng()
    x = torch.randn(4, 128, generator=rng).bfloat16()
    idx = torch.tensor([[0, 1], [2, 3], [3, -1], [-1, -1]])
    weights = torch.rand(4, 2, generator=rng) + 0.2
    return x, idx, weights, random_weights(rng, 4, 128, 32)


def test_the_exact_layer_is_the_formula() -> None:
    x, idx, weight, experts = layer_of_one_token()
    exact = exact_layer(x, idx, weight, experts, "bf16")
    right = torch.zeros(128, dtype=torch.float64)
    for k in range(2):
        e = int(idx[1, k])
        g, u, d = (w[e].double() for w in (experts.gate, experts.up, experts.down))
        row = x[1].double()
        right += float(weight[1, k]) * (d @ (torch.nn.functional.silu(g @ row) * (u @ row)))
    torch.testing.assert_close(exact.out[1], right)
    assert not exact.out[3].any()


def test_the_error_sees_what_is_wrong() -> None:
    x, idx, weight, experts = layer_of_one_token()
    exact = exact_layer(x, idx, weight, experts, "bf16")
    assert exact.error(exact.out.bfloat16()) <= ERROR_LIMIT
    for change in (
        exact_layer(x, (idx + 1).clamp(max=3), weight, experts, "bf16").out,  # other experts
        exact_layer(x, idx, weight * 1.02, experts, "bf16").out,  # other weights
        exact.out.index_fill(0, torch.tensor([1]), float("nan")),
        exact.out + torch.tensor([0.0, 0, 0, 1e-3]).unsqueeze(-1),  # a token without experts
        exact.out[:3],
    ):
        assert not exact.error(change.float()) <= ERROR_LIMIT


def test_wrong_configurations_are_refused() -> None:
    rng = new_rng()
    weights = random_weights(rng, 3, 384, 64)
    with pytest.raises(ConfigError, match="alignment=8"):
        ContiguousExperts(weights, config_of("contiguous", "fp8", 2, alignment=8), 2)
    with pytest.raises(ConfigError, match="'compact'.*'batched'"):
        BatchedExperts(weights, config_of("compact", "fp8", 2), 2)
    with pytest.raises(ConfigError, match="3 experts.*6 experts"):
        BatchedExperts(weights, config_of("batched", "fp8", 2, num_experts=12), 2)
    with pytest.raises(ConfigError, match="down"):
        ExpertWeights(weights.gate, weights.up, weights.up)
    with pytest.raises(ConfigError, match="gate"):
        ExpertWeights(weights.gate.float(), weights.up, weights.down)
