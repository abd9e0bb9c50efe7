"""Collectives that carry packed rows to the experts' ranks and reduced rows back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from ep_runtime.bench.implementation import Problem
from ep_runtime.bench.peers.wire import Wire, slots_by_rank
from ep_runtime.bench.traffic import BF16_BYTES, Traffic, busiest_direction

# torch 2.13 renames them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(slots=True)
class Memory:
    """Buffers of the largest problem; smaller ones take the leading rows.

    send [R*M, row_bytes] uint8 per input set, received [R*M, row_bytes] uint8,
    reduced and returned [R*M, H] bf16, output [M, H] bf16
    """

    send: list[torch.Tensor]
    received: torch.Tensor
    reduced: torch.Tensor
    returned: torch.Tensor
    output: torch.Tensor

    @classmethod
    def allocate(
        cls, wire: Wire, num_ranks: int, max_tokens: int, num_sets: int, device: torch.device
    ) -> Memory:
        """Fresh buffers, in an order that is the same on every rank."""
        rows = num_ranks * max_tokens

        def bf16(num_rows: int) -> torch.Tensor:
            return torch.zeros(num_rows, wire.hidden, dtype=torch.bfloat16, device=device)

        return cls(
            [wire.empty_rows(rows, device) for _ in range(num_sets)],
            wire.empty_rows(rows, device),
            bf16(rows),
            bf16(rows),
            bf16(max_tokens),
        )


class Exchange(Protocol):
    """One input set's collectives.

    send      [S, row_bytes] rows to send; slots [T, J] int32: the rows of token t, or -1
    received  [N, row_bytes] rows that arrived
    reduced   [N, H] what goes back, one row per received row
    output    [T, H]; `place` [T, R] int32 into `returned` where rows still have to be added
    """

    send: torch.Tensor
    slots: torch.Tensor
    received: torch.Tensor
    reduced: torch.Tensor
    output: torch.Tensor
    returned: torch.Tensor
    place: torch.Tensor | None

    def forward(self) -> None: ...

    def back(self) -> None: ...


class AllGather:
    """Every rank gets every row; reduce-scatter sums the ranks' rows on the way back.

    All ranks send as many rows as the fullest one has tokens.
    """

    place: torch.Tensor | None = None

    def __init__(
        self, problem: Problem, memory: Memory, index: int, group: dist.ProcessGroup
    ) -> None:
        sizes = problem.sizes
        rows = sizes.num_tokens
        tokens = sizes.tokens_of(problem.rank)
        self._group = group
        self.send = memory.send[index][:rows]
        self.slots = torch.arange(tokens, dtype=torch.int32, device=problem.device).view(-1, 1)
        self.received = memory.received[: rows * sizes.num_ranks]
        self.reduced = memory.reduced[: rows * sizes.num_ranks]
        self.returned = memory.output[:rows]
        self.output = memory.output[:tokens]

    def forward(self) -> None:
        _all_gather(self.received, self.send, group=self._group)

    def back(self) -> None:
        _reduce_scatter(self.returned, self.reduced, group=self._group)

    @staticmethod
    def wire_bytes(problem: Problem, wire: Wire) -> Traffic:
        """Each rank receives the other ranks' rows, padded, and sends as many back."""
        rows = (problem.sizes.num_ranks - 1) * problem.sizes.num_tokens
        return Traffic(rows * wire.row_bytes, rows * BF16_BYTES * wire.hidden)


class AllToAll:
    """A row goes only to ranks with one of its experts; each returns one reduced row.

    exact: split sizes of this input set, which the host must know; else every pair of ranks
    exchanges T rows, whatever the routing.
    """

    def __init__(
        self,
        problem: Problem,
        memory: Memory,
        index: int,
        group: dist.ProcessGroup,
        *,
        exact: bool,
    ) -> None:
        self._group = group
        self._exact = exact
        sizes, rank = problem.sizes, problem.rank
        counts = problem.counts[index]
        if exact:
            self._sent, self._got = counts[rank].tolist(), counts[:, rank].tolist()
        else:
            self._sent = self._got = [sizes.num_tokens] * sizes.num_ranks
        starts = [sum(self._sent[:dest]) for dest in range(sizes.num_ranks)]
        self.slots = slots_by_rank(
            problem.inputs[index].topk_idx, sizes.num_ranks, problem.num_local, starts
        )
        self.send = memory.send[index][: sum(self._sent)]
        self.received = memory.received[: sum(self._got)]
        self.reduced = memory.reduced[: sum(self._got)]
        self.returned = memory.returned[: sum(self._sent)]
        # Of its own: what one input set left must outlast the others.
        self.output = torch.empty(
            sizes.tokens_of(rank), sizes.hidden, dtype=torch.bfloat16, device=problem.device
        )
        self.place: torch.Tensor | None = self.slots

    def forward(self) -> None:
        self._swap(self.received, self.send, self._got, self._sent)

    def back(self) -> None:
        self._swap(self.returned, self.reduced, self._sent, self._got)

    def _swap(
        self, to: torch.Tensor, rows: torch.Tensor, to_split: Sequence[int], split: Sequence[int]
    ) -> None:
        if self._exact:
            dist.all_to_all_single(to, rows, list(to_split), list(split), group=self._group)
        else:
            dist.all_to_all_single(to, rows, group=self._group)

    @staticmethod
    def wire_bytes(problem: Problem, wire: Wire, *, exact: bool) -> Traffic:
        """In the busier direction of the busiest rank, header and padding included."""
        if exact:
            rows = [busiest_direction(counts) for counts in problem.counts]
        else:
            rows = [(problem.sizes.num_ranks - 1) * problem.sizes.num_tokens]
        return Traffic.mean(
            [Traffic(n * wire.row_bytes, n * BF16_BYTES * wire.hidden) for n in rows]
        )
