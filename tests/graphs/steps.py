"""Steps over a group, as eager code and captures run them, and what every chain received last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from cases import expert_factors, run_experts

from ep_runtime import Buffer, Received
from ep_runtime.scheduler import run_interleaved

Tensors = dict[str, torch.Tensor]
Scalars = Sequence[torch.Tensor | None]
Step = Callable[[list[Tensors], Scalars], list[Tensors]]

FIRST, SECOND = ("x", "idx", "weights"), ("x2", "idx2", "weights2")


class Steps:
    """The steps that are captured, and the last thing every chain received."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = list(buffers)
        config = buffers[0].config
        factors = expert_factors(config).view(buffers[0].num_ranks, -1)
        self._factors = [factors[b.rank].to(b.device) for b in buffers]
        self.received: list[list[Received]] = [[] for _ in range(config.num_chains)]

    def dispatch(self, chain: int, names: Sequence[str] = FIRST) -> Step:
        def step(inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
            sent = [
                buffer.dispatch(*(mine[name] for name in names), chain=chain, num_tokens=count)
                for buffer, mine, count in zip(self.buffers, inputs, counts, strict=True)
            ]
            self.received[chain] = [pending.wait() for pending in sent]
            return [{} for _ in inputs]

        return step

    def combine(self, chain: int) -> Step:
        def step(inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
            sent = [
                self._combine(rank, chain, mine["x"].shape[0], count)
                for rank, (mine, count) in enumerate(zip(inputs, counts, strict=True))
            ]
            return [{f"out{chain}": pending.wait()} for pending in sent]

        return step

    def in_turn(self, *steps: Step) -> Step:
        def step(inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
            outputs: list[Tensors] = [{} for _ in inputs]
            for part in steps:
                for mine, more in zip(outputs, part(inputs, counts), strict=True):
                    mine.update(more)
            return outputs

        return step

    def of(self, kind: str, chain: int) -> Step:
        dispatch, combine = self.dispatch(chain), self.combine(chain)
        return {
            "dispatch": dispatch,
            "combine": combine,
            "pair": self.in_turn(dispatch, combine),
            "triple": self.in_turn(dispatch, combine, self.dispatch(chain, SECOND)),
            "swap": self.in_turn(combine, dispatch),
        }[kind]

    def overlapped(self, inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
        """Chains 0 and 1 as two micro-batches, interleaved."""

        def micro_batch(rank: int, chain: int, names: Sequence[str]) -> Generator[Any, Any, Any]:
            mine, count, buffer = inputs[rank], counts[rank], self.buffers[rank]
            received = yield buffer.dispatch(
                *(mine[name] for name in names), chain=chain, num_tokens=count
            )
            fresh[chain].append(received)
            out = yield self._combine(rank, chain, mine["x"].shape[0], count, received)
            return {f"out{chain}": out}

        fresh: list[list[Received]] = [[], []]
        ranks = range(len(self.buffers))
        batches = [[micro_batch(r, c, n) for r in ranks] for c, n in enumerate((FIRST, SECOND))]
        first, second = run_interleaved(batches)
        self.received[:2] = fresh
        return [{**a, **b} for a, b in zip(first, second, strict=True)]

    def _combine(
        self,
        rank: int,
        chain: int,
        rows: int,
        count: torch.Tensor | None,
        received: Received | None = None,
    ) -> Any:
        """Combine what the chain received last, whoever dispatched it, into `rows` rows."""
        buffer = self.buffers[rank]
        got = self.received[chain][rank] if received is None else received
        handle = dataclasses.replace(got.handle, num_rows=rows, num_tokens=count)
        y = run_experts(got.x, got.scales, self._factors[rank])
        shape = (rows, buffer.config.hidden)
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=buffer.device)
        return buffer.combine(y, handle, out=out)
