"""ep_runtime's own Buffer as an implementation, in every receive format and mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from ep_runtime.bench.clock import spin
from ep_runtime.bench.delivered import expected_places, wrong_rows
from ep_runtime.bench.experts import amplify, dequantise, gains, weighted_gain
from ep_runtime.bench.implementation import ERROR_LIMIT, FP8_ERROR_LIMIT, Problem, Step
from ep_runtime.bench.options import Mode
from ep_runtime.bench.team import StageError
from ep_runtime.bench.traffic import Traffic, busiest_direction
from ep_runtime.buffer import Buffer
from ep_runtime.config import EpConfig
from ep_runtime.errors import SequenceError
from ep_runtime.handles import Received
from ep_runtime.layout import layout_of, shape_of
from ep_runtime.native import _C
from ep_runtime.pending import Pending
from ep_runtime.reference import Expected
from ep_runtime.world import World

TIME_BUDGET_S = 10.0  # a case that hangs must not cost the run a minute
CYCLES_PER_US = 1980  # of the kernel that stands for compute; its time is measured anyway


class Buffers:
    """The one Buffer in use. Made when a configuration is first asked for; collective."""

    def __init__(self, store: Store, rank: int, num_ranks: int, device: torch.device) -> None:
        self._place = (store, rank, num_ranks)
        self._backend: Literal["cuda", "host"] = "cuda" if device.type == "cuda" else "host"
        self._held = ExitStack()
        self._buffer: Buffer | None = None

    def get(self, config: EpConfig) -> Buffer:
        """A healthy Buffer of `config`, in a world of its own."""
        if self._buffer is None or self._buffer.config != config:
            self.close()
            self._buffer = Buffer(config, World.from_store(*self._place), self._backend)
            self._held.enter_context(self._buffer)
            self._buffer.set_time_budget(TIME_BUDGET_S)
        return self._buffer

    def close(self) -> None:
        """Give the Buffer back, together with the peers."""
        self._buffer = None
        self._held.close()

    def drop(self) -> None:
        """Leave a Buffer whose ranks may have lost each other."""
        failure = StageError("a case failed on this Buffer")
        self._buffer = None
        self._held.__exit__(StageError, failure, None)


class OurBuffer:
    """dispatch and combine of one Buffer, on its chain 0."""

    rows_stay = True

    def __init__(
        self, buffer: Buffer, problem: Problem, mode: Mode = "fused", compute_us: float = 0.0
    ) -> None:
        self._buffer = buffer
        self._problem = problem
        self._mode = mode
        self._compute_us = compute_us
        self._expected: dict[int, Expected] = {}
        self._received: Received | None = None
        self._sent: Pending[Received] | None = None
        self._returned: Pending[torch.Tensor] | None = None
        config, num_ranks = buffer.config, buffer.num_ranks
        self.error_limit = ERROR_LIMIT if config.combine_format == "bf16" else FP8_ERROR_LIMIT
        first = problem.rank * problem.num_local
        self._gain = gains(config.num_experts, config.hidden)[first : first + problem.num_local]
        self._gain = self._gain.to(problem.device)
        # What the experts wrote: combine reads it in place, so a captured chain can repeat it.
        self._y = torch.randn(
            _rows_shape(config, num_ranks), device=problem.device, dtype=torch.bfloat16
        )
        self._outputs = [
            torch.empty(inputs.x.shape, dtype=torch.bfloat16, device=problem.device)
            for inputs in problem.inputs
        ]
        self.heap_bytes: int | None = layout_of(config, num_ranks).sizes.heap
        self.wire_bytes: Traffic | None = _wire_bytes(config, problem)

    def steps(self, index: int) -> Sequence[Step]:
        dispatch, combine = self._calls(index)
        if self._mode == "fused":
            return Step("dispatch", "", dispatch["fused"]), Step("combine", "", combine["fused"])
        between = ("compute",) if self._mode == "hook" else ()
        return [
            Step(op, part, calls[part])
            for op, calls in (("dispatch", dispatch), ("combine", combine))
            for part in ("send", *between, "recv")
        ]

    def _calls(
        self, index: int
    ) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], None]]]:
        inputs, out, buffer = self._problem.inputs[index], self._outputs[index], self._buffer
        routed = (inputs.x, inputs.topk_idx, inputs.topk_weights)
        tokens = self._problem.sizes.num_tokens or None

        def dispatch_fused() -> None:
            self._received = buffer.dispatch_fused(*routed, expected_tokens=tokens)

        def dispatch_send() -> None:
            self._sent = buffer.dispatch(*routed, expected_tokens=tokens)

        def dispatch_recv() -> None:
            self._received = _not_none(self._sent).wait()

        def combine_fused() -> None:
            buffer.combine_fused(self._y, _not_none(self._received).handle, out=out)

        def combine_send() -> None:
            self._returned = buffer.combine(self._y, _not_none(self._received).handle, out=out)

        def combine_recv() -> None:
            _not_none(self._returned).wait()

        return (
            {
                "fused": dispatch_fused,
                "send": dispatch_send,
                "compute": self._compute,
                "recv": dispatch_recv,
            },
            {
                "fused": combine_fused,
                "send": combine_send,
                "compute": self._compute,
                "recv": combine_recv,
            },
        )

    def _compute(self) -> None:
        spin(int(self._compute_us * CYCLES_PER_US))

    def compute_alone(self, pairs: int) -> Callable[[object], None]:
        """The other work of mode "hook" without the communication: a body for a clock."""

        def body(_mark: object) -> None:
            for _ in range(2 * pairs):
                self._compute()

        return body

    def apply_experts(self, _index: int) -> None:
        received = _not_none(self._received)
        x, scales, format_ = received.x, received.scales, self._buffer.config.recv_format
        if format_ == "batched":
            for local, factors in enumerate(self._gain):
                rows = dequantise(x[local], None if scales is None else scales[local])
                self._y[local].copy_(amplify(rows, factors.expand(len(rows), -1)))
            return
        if format_ == "contiguous":
            ends = _not_none(received.expert_offset)[1:].contiguous()
            row = torch.arange(x.shape[0], dtype=ends.dtype, device=x.device)
            expert = torch.searchsorted(ends, row, right=True).clamp(max=len(self._gain) - 1)
            factors = self._gain[expert]
        else:
            # Rows beyond a source's messages are undefined: any index will do for them.
            chosen = _not_none(received.topk_idx).clamp(-1, len(self._gain) - 1)
            factors = weighted_gain(self._gain, chosen, _not_none(received.topk_weights))
        self._y.copy_(amplify(dequantise(x, scales), factors))

    def output(self, index: int) -> torch.Tensor:
        return self._outputs[index]

    def settle(self) -> None:
        if self._problem.device.type == "cuda":
            torch.cuda.synchronize()
        self._buffer.check()

    def check_dispatch(self, index: int) -> str:
        self.settle()
        if index not in self._expected:
            self._expected[index] = expected_places(self._problem, self._buffer.config, index)
        return wrong_rows(_not_none(self._received), self._problem, self._expected[index], index)


def _rows_shape(config: EpConfig, num_ranks: int) -> tuple[int, ...]:
    rows = config.recv_rows(num_ranks)
    if config.recv_format == "batched":
        return config.local_experts(num_ranks), rows, config.hidden
    return rows, config.hidden


def _wire_bytes(config: EpConfig, problem: Problem) -> Traffic:
    """Lines and tags included: what the 128-byte-line protocol stores to peers."""
    num_ranks = problem.sizes.num_ranks
    native = _C.layout(shape_of(config, num_ranks))
    announced = (num_ranks - 1) * native["counts_stride"]
    messages = [busiest_direction(counts) for counts in problem.counts]
    return Traffic.mean(
        [
            Traffic(m * native["message_stride"] + announced, m * native["combine_stride"])
            for m in messages
        ]
    )


def _not_none(value: object) -> Any:
    if value is None:
        raise SequenceError("a step ran before the one whose result it takes; run them in order")
    return value
