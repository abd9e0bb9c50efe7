"""A peer made of torch.distributed collectives, bare or with the kernels its user has to add.

bare         the rows arrive quantised and packed; the receiver keeps them as they came
+quantise    and the quantise-and-pack kernel: what "compact" of ours contains
+kernels     and permute to expert-major rows and the weighted sum: what "batched" contains
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch

from ep_runtime.bench.experts import amplify, dequantise, gains, local_experts, weighted_gain
from ep_runtime.bench.implementation import ERROR_LIMIT, Problem, Step
from ep_runtime.bench.peers.exchange import Exchange
from ep_runtime.bench.peers.wire import Wire, pack_rows
from ep_runtime.bench.traffic import Traffic
from ep_runtime.reference import SCALE_GROUP

# A user's quantise kernel divides with an error of an ulp. Where 448 / amax is a power of two, BF16
# channels are often exact ties of FP8, and that ulp sends all of them one step the other way: up to
# 3.9e-2 of a group of 128 channels, BF16's roundings aside. One wrong row of eight is 0.3.
OWN_QUANTISER_LIMIT = 5e-2

Additions = Literal["", "quantise", "kernels"]
RECV_FORMAT: dict[Additions, str] = {"": "rank-major", "quantise": "compact", "kernels": "batched"}


class Collective:
    """One collective on one problem: an Implementation."""

    error_limit = 2 * ERROR_LIMIT  # a reduce-scatter rounds to bf16 at every hop
    rows_stay = True

    def __init__(
        self,
        problem: Problem,
        wire: Wire,
        exchanges: Sequence[Exchange],
        wire_bytes: Traffic,
        heap_bytes: int,
        kernels: ModuleType | None,
    ) -> None:
        """`kernels`: ep_runtime.bench.peers.triton_kernels, or None to add rows with torch."""
        if kernels is not None and wire.fp8:
            self.error_limit = OWN_QUANTISER_LIMIT
        self.problem = problem
        self.wire = wire
        self.exchanges = exchanges
        self.kernels = kernels
        self.ones = torch.ones(1, problem.sizes.num_ranks, device=problem.device)
        self.wire_bytes: Traffic | None = wire_bytes
        self.heap_bytes: int | None = heap_bytes
        self.first_expert = problem.rank * problem.num_local
        gain = gains(problem.sizes.num_experts, wire.hidden)
        self.gain = gain[self.first_expert : self.first_expert + problem.num_local].to(
            problem.device
        )
        for exchange, inputs in zip(exchanges, problem.inputs, strict=True):
            wire.views(exchange.send).topk_idx.fill_(-1)  # padding, and what other sizes left
            pack_rows(wire, exchange.send, inputs, exchange.slots)

    def steps(self, index: int) -> Sequence[Step]:
        exchange = self.exchanges[index]
        steps = [
            Step("dispatch", "exchange", exchange.forward),
            Step("combine", "exchange", exchange.back),
        ]
        if exchange.place is not None:
            steps.append(Step("combine", "sum", lambda: self._sum(exchange)))
        return steps

    def _sum(self, exchange: Exchange) -> None:
        """Add a token's returned rows in rank order."""
        place, output = exchange.place, exchange.output
        if place is None or not len(output):
            return
        if self.kernels is None:
            rows = exchange.returned[place.clamp(min=0).long()].float()
            output.copy_((rows * (place >= 0).unsqueeze(-1)).sum(dim=1))
        else:
            ones = self.ones.expand(len(output), -1)
            self.kernels.weighted_sum(exchange.returned, place, ones, output)

    def apply_experts(self, index: int) -> None:
        exchange = self.exchanges[index]
        views = self.wire.views(exchange.received)
        local = local_experts(views.topk_idx, self.problem.rank, self.problem.num_local)
        factors = weighted_gain(self.gain, local, views.topk_weights)
        exchange.reduced.copy_(amplify(dequantise(views.values, views.scales), factors))

    def output(self, index: int) -> torch.Tensor:
        return self.exchanges[index].output

    def settle(self) -> None:
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize()

    def check_dispatch(self, _index: int) -> str:
        return ""


class WithKernels(Collective):
    """The collective and the kernels around it."""

    def __init__(
        self,
        problem: Problem,
        wire: Wire,
        exchanges: Sequence[Exchange],
        wire_bytes: Traffic,
        heap_bytes: int,
        kernels: ModuleType,
        additions: Additions,
    ) -> None:
        super().__init__(problem, wire, exchanges, wire_bytes, heap_bytes, kernels)
        self._kernels = kernels
        self._permutes = additions == "kernels"
        self.rows_stay = not self._permutes  # its atomics hand out places in any order
        device, sizes = problem.device, problem.sizes
        self._counts = torch.zeros(problem.num_local, dtype=torch.int32, device=device)
        most = max(len(exchange.received) for exchange in exchanges)
        self._place = torch.full((most, sizes.topk), -1, dtype=torch.int32, device=device)
        if not self._permutes:
            return
        lead = (problem.num_local, sizes.num_ranks * problem.max_tokens)
        dtype = torch.float8_e4m3fn if wire.fp8 else torch.bfloat16
        self._x = torch.empty(*lead, wire.hidden, dtype=dtype, device=device)
        self._scales = (
            torch.empty(*lead, wire.hidden // SCALE_GROUP, device=device) if wire.fp8 else None
        )
        self._y = torch.randn(*lead, wire.hidden, dtype=torch.bfloat16, device=device)

    def steps(self, index: int) -> Sequence[Step]:
        exchange = self.exchanges[index]
        steps = [
            Step("dispatch", "quantise", lambda: self._pack(index)),
            Step("dispatch", "exchange", exchange.forward),
        ]
        if self._permutes:
            steps.append(Step("dispatch", "permute", lambda: self._permute(exchange)))
            steps.append(Step("combine", "reduce", lambda: self._reduce(exchange)))
        steps.append(Step("combine", "exchange", exchange.back))
        if exchange.place is not None:
            steps.append(Step("combine", "sum", lambda: self._sum(exchange)))
        return steps

    def _pack(self, index: int) -> None:
        exchange = self.exchanges[index]
        inputs = self.problem.inputs[index]
        self._kernels.pack(self.wire, exchange.send, inputs, exchange.slots, self._counts)

    def _permute(self, exchange: Exchange) -> None:
        place = self._place[: len(exchange.received)]
        views = self.wire.views(exchange.received)
        self._kernels.permute(
            self.wire, views, self.first_expert, self._counts, self._x, self._scales, place
        )

    def _reduce(self, exchange: Exchange) -> None:
        weights = self.wire.views(exchange.received).topk_weights
        place = self._place[: len(exchange.received)]
        y = self._y.view(-1, self.wire.hidden)
        self._kernels.weighted_sum(y, place, weights, exchange.reduced)

    def apply_experts(self, index: int) -> None:
        if not self._permutes:
            super().apply_experts(index)
            return
        for expert, factors in enumerate(self.gain):
            scales = None if self._scales is None else self._scales[expert]
            rows = dequantise(self._x[expert], scales)
            self._y[expert].copy_(amplify(rows, factors.expand(len(rows), -1)))
