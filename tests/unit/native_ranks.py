"""A group of host ranks in one process, and what torch says they must compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_runtime import _C

FP8 = torch.float8_e4m3fn
Routing = Sequence[Tensor]  # the memory of one dispatch's handle, on every rank
FORMATS = {
    "batched": _C.RECV_BATCHED,
    "contiguous": _C.RECV_CONTIGUOUS,
    "compact": _C.RECV_COMPACT,
}


@dataclass(frozen=True)
class Sizes:
    """A shape, as plain numbers."""

    num_ranks: int = 4
    num_experts: int = 16
    topk: int = 4
    hidden: int = 256
    max_tokens: int = 12
    num_chains: int = 2
    fp8: bool = False

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    def shape(self) -> _C.Shape:
        return _C.Shape(
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            topk=self.topk,
            hidden=self.hidden,
            max_tokens=self.max_tokens,
            num_chains=self.num_chains,
            wire=_C.WIRE_FP8 if self.fp8 else _C.WIRE_BF16,
        )


@dataclass
class Step:
    """What a rank dispatches: x bf16 [T, H], topk_idx [T, K], weights f32 [T, K]."""

    x: Tensor
    topk_idx: Tensor
    weights: Tensor
    num_tokens: Tensor | None = None  # int32 scalar

    @property
    def num_real(self) -> int:
        total = self.x.shape[0]
        return total if self.num_tokens is None else min(max(int(self.num_tokens), 0), total)


def random_step(sizes: Sizes, tokens: int, idx_dtype: torch.dtype = torch.int64) -> Step:
    """Distinct experts per token, about one entry in six without expert."""
    scores = torch.rand(tokens, sizes.num_experts)
    idx = scores.argsort(dim=1)[:, : sizes.topk]
    idx = torch.where(torch.rand(idx.shape) < 1 / 6, -1, idx)
    x = torch.randn(tokens, sizes.hidden) * torch.exp(torch.randn(tokens, 1) * 3)
    return Step(x.to(torch.bfloat16), idx.to(idx_dtype), torch.randn(tokens, sizes.topk))


@dataclass
class Received:
    """Output tensors of one rank, poisoned."""

    sizes: Sizes
    recv_format: int
    alignment: int = 16
    x: Tensor = field(init=False)
    scales: Tensor = field(init=False)
    recv_count: Tensor = field(init=False)
    expert_offset: Tensor = field(init=False)
    topk_idx: Tensor = field(init=False)
    topk_weights: Tensor = field(init=False)
    num_messages: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.sizes
        messages = s.num_ranks * s.max_tokens
        spread = min(s.topk, s.num_local_experts)
        rows = {
            _C.RECV_BATCHED: s.num_local_experts * messages,
            _C.RECV_CONTIGUOUS: messages * spread + s.num_local_experts * (self.alignment - 1),
            _C.RECV_COMPACT: messages,
        }[self.recv_format]
        width = s.hidden if s.fp8 else 2 * s.hidden
        self.x = torch.full((rows, width), 0xAB, dtype=torch.uint8)
        self.scales = torch.full((rows, s.hidden // 128), -7.0)
        self.recv_count = torch.full((s.num_local_experts,), -7, dtype=torch.int32)
        self.expert_offset = torch.full((s.num_local_experts + 1,), -7, dtype=torch.int32)
        self.topk_idx = torch.full((messages, s.topk), -7, dtype=torch.int32)
        self.topk_weights = torch.full((messages, s.topk), -7.0)
        self.num_messages = torch.full((s.num_ranks,), -7, dtype=torch.int32)

    def target(self, shape: _C.Shape, routing: Tensor) -> _C.RecvTarget:
        compact = self.recv_format == _C.RECV_COMPACT
        contiguous = self.recv_format == _C.RECV_CONTIGUOUS
        groups = self.scales.shape[1]
        rows_of_expert = self.sizes.num_ranks * self.sizes.max_tokens
        return _C.RecvTarget(
            shape,
            routing=routing.data_ptr(),
            wire=_C.WIRE_FP8 if self.sizes.fp8 else _C.WIRE_BF16,
            scale_expert_stride=rows_of_expert * groups,
            scale_row_stride=groups,
            scale_group_stride=1,
            format=self.recv_format,
            alignment=self.alignment,
            x=self.x.data_ptr(),
            num_rows=self.x.shape[0],
            scales=self.scales.data_ptr() if self.sizes.fp8 else 0,
            recv_count=self.recv_count.data_ptr(),
            expert_offset=self.expert_offset.data_ptr() if contiguous else 0,
            topk_idx=self.topk_idx.data_ptr() if compact else 0,
            topk_weights=self.topk_weights.data_ptr() if compact else 0,
            num_messages=self.num_messages.data_ptr(),
        )


class Ranks:
    """All ranks of a group, driven in turn: every send comes before any receive."""

    def __init__(self, sizes: Sizes, budget_seconds: float = 60.0) -> None:
        self.sizes = sizes
        self.shape = sizes.shape()
        self.layout = _C.layout(self.shape)
        count = sizes.num_ranks
        self.heaps = [_C.HostMemory(self.layout["heap_bytes"]) for _ in range(count)]
        self.locals = [_C.HostMemory(self.layout["local_bytes"]) for _ in range(count)]
        self.faults = [_C.HostMemory(_C.fault_bytes()) for _ in range(count)]
        addresses = [heap.address for heap in self.heaps]
        self.ranks = [
            _C.HostRank(self.shape, r, addresses, self.locals[r].address, self.faults[r].address)
            for r in range(count)
        ]
        for rank in self.ranks:
            rank.set_time_budget(int(budget_seconds * 1e9))
        self.routing = [self.new_routing() for _ in range(sizes.num_chains)]  # [chain][rank]

    def new_routing(self) -> list[Tensor]:
        """Poisoned memory for one dispatch's handle, on every rank."""
        size = (self.layout["routing_bytes"],)
        return [torch.full(size, 0xAB, dtype=torch.uint8) for _ in range(self.sizes.num_ranks)]

    def _routing(self, rank: int, chain: int, routing: Routing | None) -> Tensor:
        return (self.routing[chain] if routing is None else routing)[rank]

    def dispatch_send(
        self, rank: int, step: Step, chain: int = 0, routing: Routing | None = None
    ) -> None:
        given = self.send_input(step, self._routing(rank, chain, routing))
        self.ranks[rank].dispatch_send(chain, given)

    def send_input(self, step: Step, routing: Tensor) -> _C.SendInput:
        return _C.SendInput(
            self.shape,
            routing=routing.data_ptr(),
            wire=_C.WIRE_FP8 if self.sizes.fp8 else _C.WIRE_BF16,
            x=step.x.data_ptr(),
            x_stride=2 * step.x.stride(0),
            topk_idx=step.topk_idx.data_ptr(),
            idx_bytes=step.topk_idx.element_size(),
            weights=step.weights.data_ptr(),
            num_tokens=step.x.shape[0],
            num_tokens_address=0 if step.num_tokens is None else step.num_tokens.data_ptr(),
        )

    def dispatch_recv(
        self,
        rank: int,
        chain: int = 0,
        recv_format: int = _C.RECV_BATCHED,
        routing: Routing | None = None,
    ) -> Received:
        received = Received(self.sizes, recv_format)
        target = received.target(self.shape, self._routing(rank, chain, routing))
        self.ranks[rank].dispatch_recv(chain, target)
        return received

    def dispatch(
        self,
        steps: Sequence[Step],
        chain: int = 0,
        recv_format: int = _C.RECV_BATCHED,
        routing: Routing | None = None,
    ) -> list[Received]:
        for rank, step in enumerate(steps):
            self.dispatch_send(rank, step, chain, routing)
        return [self.dispatch_recv(r, chain, recv_format, routing) for r in range(len(steps))]

    def combine(
        self,
        steps: Sequence[Step],
        ys: Sequence[Tensor],
        chain: int = 0,
        routing: Routing | None = None,
    ) -> list[Tensor]:
        for rank, y in enumerate(ys):
            self.combine_send(rank, y, chain, routing)
        return [self.combine_recv(r, step, chain, routing) for r, step in enumerate(steps)]

    def combine_send(
        self, rank: int, y: Tensor, chain: int = 0, routing: Routing | None = None
    ) -> None:
        address = self._routing(rank, chain, routing).data_ptr()
        given = _C.CombineInput(self.shape, routing=address, y=y.data_ptr(), y_stride=y.stride(0))
        self.ranks[rank].combine_send(chain, given)

    def combine_recv(
        self, rank: int, step: Step, chain: int = 0, routing: Routing | None = None
    ) -> Tensor:
        out = torch.full((step.x.shape[0], self.sizes.hidden), torch.nan, dtype=torch.bfloat16)
        output = _C.CombineOutput(
            self.shape,
            routing=self._routing(rank, chain, routing).data_ptr(),
            out=out.data_ptr(),
            num_tokens=out.shape[0],
            num_tokens_address=0 if step.num_tokens is None else step.num_tokens.data_ptr(),
        )
        self.ranks[rank].combine_recv(chain, output)
        return out

    def fault(self, rank: int) -> _C.Fault | None:
        return _C.read_fault(self.faults[rank].address)

    def routing_fault(self, rank: int) -> _C.Fault | None:
        return _C.read_routing_fault(self.faults[rank].address)

    def reset(self) -> None:
        for rank, board in zip(self.ranks, self.faults, strict=True):
            rank.reset()
            _C.clear_faults(board.address)

    def word(self, owner: int, offset: int) -> ctypes.c_uint32:
        """A 32-bit word of a rank's heap, to read or to damage."""
        return ctypes.c_uint32.from_address(self.heaps[owner].address + offset)

    def counts_offset(self, epoch: int, source: int) -> int:
        """Offset of a counts message of chain 0."""
        index = (epoch & 1) * self.sizes.num_ranks + source
        return 128 + index * self.layout["counts_stride"]

    def ready_offset(self, epoch: int, source: int) -> int:
        """Offset of the line that says that `source` is in a combine of chain 0."""
        index = (epoch & 1) * self.sizes.num_ranks + source
        return self.counts_offset(0, 2 * self.sizes.num_ranks) + 128 * index

    def message_offset(self, epoch: int, source: int, slot: int) -> int:
        """Offset of a dispatched message of chain 0."""
        index = source * self.sizes.max_tokens + slot
        half = (epoch & 1) * self.layout["dispatch_half"]
        return self.layout["dispatch_offset"] + half + index * self.layout["message_stride"]


@dataclass(frozen=True)
class Arrival:
    """One message that a rank must get; `entries` are its (k, local expert), in k order."""

    source: int
    token: int
    entries: tuple[tuple[int, int], ...]


def arrivals(sizes: Sizes, steps: Sequence[Step], rank: int) -> list[Arrival]:
    """In (source, token) order."""
    found = []
    for source, step in enumerate(steps):
        for token, experts in enumerate(step.topk_idx[: step.num_real].tolist()):
            entries = tuple(
                (k, expert % sizes.num_local_experts)
                for k, expert in enumerate(experts)
                if expert >= 0 and expert // sizes.num_local_experts == rank
            )
            if entries:
                found.append(Arrival(source, token, entries))
    return found


def wire_rows(sizes: Sizes, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bytes of rows on the wire, [T, bytes], and their scales [T, H/128]."""
    if not sizes.fp8:
        return x.contiguous().view(torch.uint8), None
    groups = x.float().view(x.shape[0], sizes.hidden // 128, 128)
    amax = groups.abs().amax(2, keepdim=True).clamp(min=1e-4)
    most = torch.full_like(amax, 448.0)  # `448 / tensor` is a rounded reciprocal times 448
    values = (groups * (most / amax)).clamp(-448, 448).to(FP8)
    return values.view(torch.uint8).flatten(1), (amax / most).squeeze(2)


def expected_combine(
    steps: Sequence[Step], expert: Sequence[float], source: int
) -> tuple[Tensor, Tensor]:
    """float64 sums where expert e answers x * expert[e], and the most that rounding may add.

    Each rank rounds its sum to bf16 once, the source once more: 2^-8 of what is added, twice.
    """
    step = steps[source]
    factors = torch.tensor([*expert, 0.0], dtype=torch.float64)[step.topk_idx.long()]
    answers = (step.x[:, None, :] * factors[:, :, None].to(torch.bfloat16)).double()
    terms = answers * step.weights.double()[:, :, None]
    terms[step.num_real :] = 0.0
    return terms.sum(1), terms.abs().sum(1) * 2.0**-7
