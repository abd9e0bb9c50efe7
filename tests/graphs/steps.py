"""Steps over a group, as eager code and captures run them, and what was received last.

Every chain has two sets of receive tensors: 0 is its own, 1 is one of Buffer.new_receive(). A step
is written as parts, each of them for all ranks:

    d0  send a dispatch into set 0        c0  send a combine of set 0's handle
    r0  receive it                        a0  the same, of twice the experts' results
                                          h0  receive what came home
"""

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

SETS = (0, 1)
PAIR = ("d0", "r0", "c0", "h0")
FIRST, SECOND = ("x", "idx", "weights"), ("x2", "idx2", "weights2")


class Steps:
    """The steps that are captured, and the last thing that every set of tensors received."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = list(buffers)
        config = buffers[0].config
        factors = expert_factors(config).view(buffers[0].num_ranks, -1)
        self._factors = [factors[b.rank].to(b.device) for b in buffers]
        chains = range(config.num_chains)
        self._apart = {chain: [b.new_receive() for b in buffers] for chain in chains}
        self.received: dict[tuple[int, int], list[Received]] = {}

    def of(self, parts: Sequence[str], chain: int) -> Step:
        """The step of these parts; its n-th dispatch sends FIRST, then SECOND, its n-th output is
        "out{n}".
        """

        def step(inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
            outputs: list[Tensors] = [{} for _ in inputs]
            names = iter((FIRST, SECOND))
            sent: list[Any] = []
            back: list[Any] = []
            for part in parts:
                kind, number = part[0], int(part[1])
                if kind == "d":
                    sent = self._send(chain, number, next(names), inputs, counts)
                elif kind == "r":
                    self.received[chain, number] = [pending.wait() for pending in sent]
                elif kind in "ca":
                    back = self._send_back(chain, number, kind == "a", inputs, counts)
                else:
                    name = f"out{len(outputs[0])}"
                    for mine, pending in zip(outputs, back, strict=True):
                        mine[name] = pending.wait()
            return outputs

        return step

    def _send(
        self,
        chain: int,
        number: int,
        names: Sequence[str],
        inputs: list[Tensors],
        counts: Scalars,
    ) -> list[Any]:
        return [
            buffer.dispatch(
                *(mine[name] for name in names),
                chain=chain,
                num_tokens=count,
                out=apart if number else None,
            )
            for buffer, mine, count, apart in zip(
                self.buffers, inputs, counts, self._apart[chain], strict=True
            )
        ]

    def _send_back(
        self, chain: int, number: int, twice: bool, inputs: list[Tensors], counts: Scalars
    ) -> list[Any]:
        got = self.received[chain, number]
        return [
            self._combine(rank, mine["x"].shape[0], count, got[rank], twice)
            for rank, (mine, count) in enumerate(zip(inputs, counts, strict=True))
        ]

    def overlapped(self, inputs: list[Tensors], counts: Scalars) -> list[Tensors]:
        """Chains 0 and 1 as two micro-batches, interleaved."""

        def micro_batch(rank: int, chain: int, names: Sequence[str]) -> Generator[Any, Any, Any]:
            mine, count, buffer = inputs[rank], counts[rank], self.buffers[rank]
            received = yield buffer.dispatch(
                *(mine[name] for name in names), chain=chain, num_tokens=count
            )
            fresh[chain].append(received)
            out = yield self._combine(rank, mine["x"].shape[0], count, received)
            return {f"out{chain}": out}

        fresh: list[list[Received]] = [[], []]
        ranks = range(len(self.buffers))
        batches = [[micro_batch(r, c, n) for r in ranks] for c, n in enumerate((FIRST, SECOND))]
        first, second = run_interleaved(batches)
        for chain in (0, 1):
            self.received[chain, 0] = fresh[chain]
        return [{**a, **b} for a, b in zip(first, second, strict=True)]

    def _combine(
        self,
        rank: int,
        rows: int,
        count: torch.Tensor | None,
        got: Received,
        twice: bool = False,
    ) -> Any:
        """Combine what was received, whoever dispatched it, into `rows` rows."""
        buffer = self.buffers[rank]
        handle = dataclasses.replace(got.handle, num_rows=rows, num_tokens=count)
        factors = self._factors[rank] * (2 if twice else 1)
        y = run_experts(got.x, got.scales, factors)
        shape = (rows, buffer.config.hidden)
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=buffer.device)
        return buffer.combine(y, handle, out=out)
