"""DeepEP's low-latency kernels (the V1 `deep_ep.Buffer`), as an implementation.

One Buffer per size lives for the whole process, at max_tokens: it is expensive to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deep_ep
import torch
import torch.distributed as dist

from ep_runtime.bench.experts import amplify, dequantise, gains
from ep_runtime.bench.implementation import Problem, Step
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.traffic import Traffic

RECV_FORMAT = "batched"
ERROR_LIMIT = 3e-2  # it quantises by its own rounding: neighbouring e4m3 values may differ

_buffers: dict[tuple[int, int, int], tuple[Any, int]] = {}


def build(_options: LowLatencyOptions, group: dist.ProcessGroup, problem: Problem) -> DeepEp:
    """Collective: the first problem of a size makes the Buffer."""
    sizes = problem.sizes
    key = (sizes.num_experts, sizes.hidden, problem.max_tokens)
    if key not in _buffers:
        num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            problem.max_tokens, sizes.hidden, sizes.num_ranks, sizes.num_experts
        )
        buffer = deep_ep.Buffer(
            group,
            num_rdma_bytes=num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=problem.num_local,
            allow_nvlink_for_low_latency_mode=True,
        )
        _buffers[key] = (buffer, num_bytes)
    buffer, num_bytes = _buffers[key]
    return DeepEp(problem, buffer, num_bytes)


class DeepEp:
    """dispatch and combine in one kernel each; its slots are in no fixed order."""

    error_limit = ERROR_LIMIT
    rows_stay = False
    wire_bytes: Traffic | None = None

    def __init__(self, problem: Problem, buffer: Any, num_bytes: int) -> None:
        self.problem = problem
        self._buffer = buffer
        self.heap_bytes: int | None = num_bytes
        sizes = problem.sizes
        first = problem.rank * problem.num_local
        gain = gains(sizes.num_experts, sizes.hidden)[first : first + problem.num_local]
        self._gain = gain.to(problem.device)
        lead = (problem.num_local, sizes.num_ranks * problem.max_tokens)
        self._y = torch.randn(*lead, sizes.hidden, dtype=torch.bfloat16, device=problem.device)
        self._outputs = [torch.empty_like(inputs.x) for inputs in problem.inputs]
        self._received: Any = None
        self._handle: Any = None

    def steps(self, index: int) -> Sequence[Step]:
        inputs, sizes = self.problem.inputs[index], self.problem.sizes

        def dispatch() -> None:
            self._received, _count, self._handle, _event, _hook = self._buffer.low_latency_dispatch(
                inputs.x,
                inputs.topk_idx,
                self.problem.max_tokens,
                sizes.num_experts,
                use_fp8=self.problem.dispatch_format == "fp8",
            )

        def combine() -> None:
            self._buffer.low_latency_combine(
                self._y,
                inputs.topk_idx,
                inputs.topk_weights,
                self._handle,
                out=self._outputs[index],
            )

        return Step("dispatch", "", dispatch), Step("combine", "", combine)

    def apply_experts(self, _index: int) -> None:
        received = self._received
        x, scales = received if isinstance(received, tuple) else (received, None)
        for expert, factors in enumerate(self._gain):
            rows = dequantise(x[expert], None if scales is None else scales[expert])
            self._y[expert].copy_(amplify(rows, factors.expand(len(rows), -1)))

    def output(self, index: int) -> torch.Tensor:
        return self._outputs[index]

    def settle(self) -> None:
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize()

    def check_dispatch(self, _index: int) -> str:
        return ""
