"""FlashInfer's one-sided all-to-all (`flashinfer.comm.MoeAlltoAll`), as an implementation.

It takes rows that are quantised already and delivers one row per message; its caller weighs and
sums. Rows of no token are marked by expert -1 ("sanitize").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from flashinfer.comm import Mapping  # type: ignore[import-not-found]
from flashinfer.comm.mnnvl import (  # type: ignore[import-not-found]
    MnnvlConfig,
    TorchDistBackend,
)
from flashinfer.comm.trtllm_moe_alltoall import (  # type: ignore[import-not-found]
    MoeAlltoAll,
    moe_a2a_get_workspace_size_per_rank,
)

from ep_runtime.bench.experts import (
    amplify,
    dequantise,
    gains,
    local_experts,
    weighted_gain,
)
from ep_runtime.bench.implementation import ERROR_LIMIT, Problem, Step
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.traffic import BF16_BYTES, Traffic, row_bytes
from ep_runtime.reference import quantize_fp8

RECV_FORMAT = "rank-major"
ENTRY_BYTES = 4

_exchanges: dict[tuple[int, int, int, int], tuple[Any, int]] = {}


def build(options: LowLatencyOptions, group: dist.ProcessGroup, problem: Problem) -> FlashInfer:
    """Collective: the first problem of a size makes the workspace, for bf16 rows."""
    sizes = problem.sizes
    key = (sizes.num_experts, sizes.topk, sizes.hidden, problem.max_tokens)
    if key not in _exchanges:
        entries = 2 * ENTRY_BYTES * sizes.topk
        num_bytes = moe_a2a_get_workspace_size_per_rank(
            sizes.num_ranks,
            problem.max_tokens,
            row_bytes("bf16", sizes.hidden) + entries,
            BF16_BYTES * sizes.hidden,
        )
        mapping = Mapping(
            world_size=sizes.num_ranks,
            rank=problem.rank,
            gpus_per_node=sizes.num_ranks,
            tp_size=sizes.num_ranks,
            moe_ep_size=sizes.num_ranks,
        )
        exchange = MoeAlltoAll(
            mapping,
            max_num_tokens=problem.max_tokens,
            top_k=sizes.topk,
            num_experts=sizes.num_experts,
            workspace_size_per_rank=num_bytes,
            mnnvl_config=MnnvlConfig(comm_backend=TorchDistBackend(group)),
        )
        _exchanges[key] = (exchange, num_bytes)
    exchange, num_bytes = _exchanges[key]
    return FlashInfer(problem, exchange, num_bytes, options.input_sets)


class FlashInfer:
    """dispatch (with sanitize) and combine, the combine's input in the workspace."""

    error_limit = ERROR_LIMIT
    rows_stay = False
    wire_bytes: Traffic | None = None

    def __init__(self, problem: Problem, exchange: Any, num_bytes: int, num_sets: int) -> None:
        self.problem = problem
        self._exchange = exchange
        self.heap_bytes: int | None = num_bytes
        sizes = problem.sizes
        gain = gains(sizes.num_experts, sizes.hidden)
        first = problem.rank * problem.num_local
        self._gain = gain[first : first + problem.num_local].to(problem.device)
        self._payloads = [self._payload(index) for index in range(num_sets)]
        self._outputs = [torch.empty_like(inputs.x) for inputs in problem.inputs]
        self._received: list[torch.Tensor] = []

    def _payload(self, index: int) -> list[torch.Tensor]:
        """[experts int32, weights, rows] and the scales of fp8 rows."""
        inputs = self.problem.inputs[index]
        routes = [inputs.topk_idx.int(), inputs.topk_weights]
        if self.problem.dispatch_format == "bf16":
            return [*routes, inputs.x]
        values, scales = quantize_fp8(inputs.x)
        return [*routes, values, scales]

    def steps(self, index: int) -> Sequence[Step]:
        payload, tokens = self._payloads[index], self.problem.sizes.num_tokens

        def dispatch() -> None:
            self._received = self._exchange.dispatch(
                payload[0],
                payload,
                tokens,
                invalid_token_expert_id=-1,
                expert_id_payload_index=0,
            )

        def combine() -> None:
            out = self._exchange.combine(self._space(), tokens, payload_in_workspace=True)
            # It allocates its result; under capture that memory stays the graph's.
            self._outputs[index] = out

        return Step("dispatch", "", dispatch), Step("combine", "", combine)

    def _space(self) -> torch.Tensor:
        space: torch.Tensor = self._exchange.get_combine_payload_tensor_in_workspace(
            self.problem.sizes.num_tokens, self.problem.sizes.hidden, torch.bfloat16
        )
        return space

    def apply_experts(self, _index: int) -> None:
        idx, weights, values, *scales = self._received
        local = local_experts(idx, self.problem.rank, self.problem.num_local)
        factors = weighted_gain(self._gain, local, weights)
        rows = dequantise(values, scales[0] if scales else None)
        self._space().copy_(amplify(rows, factors))

    def output(self, index: int) -> torch.Tensor:
        return self._outputs[index]

    def settle(self) -> None:
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize()

    def check_dispatch(self, _index: int) -> str:
        return ""
