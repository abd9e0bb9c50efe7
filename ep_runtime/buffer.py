"""Dispatch and combine of one rank."""

from __future__ import annotations

from dataclasses import fields
from types import TracebackType
from typing import Literal, NoReturn

import torch

from ep_runtime import env
from ep_runtime.config import EpConfig
from ep_runtime.connect import Backend, choose_device, connect
from ep_runtime.errors import EpError, SequenceError
from ep_runtime.faults import fatal_error, routing_error
from ep_runtime.handles import Handle, Received, StepStats, allocate_inbox
from ep_runtime.layout import layout_of
from ep_runtime.memory import RankMemory
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.ops import make_ops
from ep_runtime.order import SendOrder
from ep_runtime.pending import Pending
from ep_runtime.validate import Checker
from ep_runtime.world import World

CLOSE_TIMEOUT_S = 10.0  # how long close() waits for peers before it keeps what they may write to


class Buffer:
    """One rank's end of the group: its heap, its chains, and the operations on them.

    Building one is collective. All state of a step lives on the device, so captured operations
    may be replayed in any order, as long as every rank runs the same sequence on a chain.
    """

    def __init__(
        self,
        config: EpConfig,
        world: World,
        backend: Backend = "auto",
        *,
        device: torch.device | int | str | None = None,
    ) -> None:
        """Join the group. Collective.

        backend  "host", "cuda", or "auto": CUDA where torch and the native module have it
        device   the GPU; default: torch's current one
        Raises ConfigError on every rank if configurations differ (naming ranks and fields),
        BuildError where this machine lacks what it takes, PeerTimeout if a rank does not come.
        """
        place = world.agree("choosing the backend", lambda: choose_device(backend, device))
        memory = connect(config, world, place)
        self._assemble(config, world, place, memory, None)
        world.barrier()  # nobody sends before every heap is zeroed and mapped

    @classmethod
    def _virtual(
        cls,
        config: EpConfig,
        world: World,
        device: torch.device,
        memory: RankMemory,
        order: SendOrder,
    ) -> Buffer:
        self = cls.__new__(cls)
        self._assemble(config, world, device, memory, order)
        return self

    def _assemble(
        self,
        config: EpConfig,
        world: World,
        device: torch.device,
        memory: RankMemory,
        order: SendOrder | None,
    ) -> None:
        self.config = config
        self.world = world
        self.rank = world.rank
        self.num_ranks = world.num_ranks
        self.device = device
        self.memory_kind = memory.kind
        self._memory = memory
        self._order = order
        self._closed = False
        self._on_host = device.type == "cpu"
        self._fault = memory.fault
        self._identity = object()
        self._ops = make_ops(config, self.rank, memory, device)
        self._check_dispatch = Checker(config, self.num_ranks, device, self._identity).dispatch
        self._check_combine = Checker(config, self.num_ranks, device, self._identity).combine
        self._inboxes = [
            allocate_inbox(config, self.num_ranks, chain, device, self._identity)
            for chain in range(config.num_chains)
        ]
        self._open: list[Pending[Received] | Pending[torch.Tensor] | None]
        self._open = [None] * config.num_chains
        self._routing_told = 0
        self._read_fault, self._read_routing = _C.read_fault, _C.read_routing_fault
        self._ops.synchronize()
        self.set_time_budget(env.read().warmup_timeout_s)

    @property
    def backend(self) -> Literal["host", "cuda"]:
        """Where this rank works."""
        return "host" if self._on_host else "cuda"

    @property
    def local_experts(self) -> range:
        """The experts this rank owns."""
        count = self.config.local_experts(self.num_ranks)
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def virtual(self) -> bool:
        """True for one of several ranks of this process."""
        return self._order is not None

    # ---- operations -----------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        chain: int = 0,
        num_tokens: torch.Tensor | None = None,
        expected_tokens: int | None = None,
    ) -> Pending[Received]:
        """Send each token's row to the ranks that own its experts.

        x                [T, H] bf16, T <= max_tokens, unit stride in H, rows 16-byte aligned
        topk_idx         [T, K] int64 or int32; -1 is no expert, each expert once per token
        topk_weights     [T, K] float32
        num_tokens       int32 scalar on the device: rows from it on are never sent; None: T
        expected_tokens  most tokens any rank sends now: sizes the launch, any value is correct
        Capturable. T may differ between ranks and be 0. Raises ShapeError or SequenceError before
        anything is launched, and whatever check() raises.
        """
        self.check()
        stride = self._check_dispatch(x, topk_idx, topk_weights, chain, num_tokens, expected_tokens)
        self._claim("dispatch", chain)
        self._ops.dispatch_send(chain, x, stride, topk_idx, topk_weights, num_tokens)
        if self._order is not None:
            self._order.sent(self.rank, chain)
        handle = Handle(self._identity, chain, x.shape[0], num_tokens, expected_tokens or 0)

        def finish(pending: Pending[Received]) -> Received:
            self._before_wait(pending)
            inbox = self._inboxes[chain]
            self._ops.dispatch_recv(chain, inbox.target, handle.expected_tokens)
            self._after_host_wait()
            return inbox.hand_out(handle)

        pending = Pending("dispatch", chain, finish)
        self._open[chain] = pending
        return pending

    def combine(
        self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None
    ) -> Pending[torch.Tensor]:
        """Bring expert results home: out[t] = sum over k of weight[t, k] * y(expert of k, t).

        y       bf16 in the shape of Received.x, unit stride in H. "compact": one row per message,
                already weighted and summed over this rank's experts
        handle  of the dispatch
        out     [T, H] bf16, contiguous; allocated if None. A token without experts gets zeros
        The order of additions is fixed: equal inputs give equal bits. FP32 inside, rounded to
        BF16 once per rank and once at the end. Capturable. Raises as dispatch() does.
        """
        self.check()
        stride = self._check_combine(y, handle, out)
        chain = handle.chain
        self._claim("combine", chain)
        result = self._out(handle) if out is None else out
        self._ops.combine_send(chain, y, stride, handle.expected_tokens)
        if self._order is not None:
            self._order.sent(self.rank, chain)

        def finish(pending: Pending[torch.Tensor]) -> torch.Tensor:
            self._before_wait(pending)
            self._ops.combine_recv(chain, result, handle.num_tokens)
            self._after_host_wait()
            return result

        pending = Pending("combine", chain, finish)
        self._open[chain] = pending
        return pending

    def dispatch_fused(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        chain: int = 0,
        num_tokens: torch.Tensor | None = None,
        expected_tokens: int | None = None,
    ) -> Received:
        """dispatch() and wait() in one kernel. Capturable.

        Raises SequenceError on virtual ranks that share a device: one's receive would keep the
        other's send from starting.
        """
        self.check()
        self._only_alone("dispatch_fused", "dispatch")
        stride = self._check_dispatch(x, topk_idx, topk_weights, chain, num_tokens, expected_tokens)
        self._claim("dispatch_fused", chain)
        inbox = self._inboxes[chain]
        handle = Handle(self._identity, chain, x.shape[0], num_tokens, expected_tokens or 0)
        self._ops.dispatch_fused(
            chain,
            x,
            stride,
            topk_idx,
            topk_weights,
            num_tokens,
            inbox.target,
            handle.expected_tokens,
        )
        self._after_host_wait()
        return inbox.hand_out(handle)

    def combine_fused(
        self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """combine() and wait() in one kernel. Capturable. Raises as dispatch_fused() does."""
        self.check()
        self._only_alone("combine_fused", "combine")
        stride = self._check_combine(y, handle, out)
        self._claim("combine_fused", handle.chain)
        result = self._out(handle) if out is None else out
        self._ops.combine_fused(
            handle.chain, y, stride, result, handle.num_tokens, handle.expected_tokens
        )
        self._after_host_wait()
        return result

    def _out(self, handle: Handle) -> torch.Tensor:
        return torch.empty(
            (handle.num_rows, self.config.hidden), dtype=torch.bfloat16, device=self.device
        )

    # ---- order of calls -------------------------------------------------------------------------

    def _claim(self, op: str, chain: int) -> None:
        """Raise unless every receive of the chain was waited for (in this process's calls)."""
        if self._closed:
            raise SequenceError(f"{op} on a closed Buffer; build a new one")
        unfinished = self._open[chain]
        if unfinished is not None:
            raise SequenceError(
                f"{op} on chain {chain}: its last {unfinished.op} was not waited for; call wait()"
                " on what it returned, use another chain, or reset() on every rank to drop it"
            )

    def _before_wait(self, pending: Pending[Received] | Pending[torch.Tensor]) -> None:
        if self._order is not None:
            self._order.before_wait(self.rank, pending.chain)
        pending.close()
        self._open[pending.chain] = None

    def _after_host_wait(self) -> None:
        """A host receive has already failed or not when it returns: say so now."""
        if self._on_host:
            fault = self._read_fault(self._fault)
            if fault is not None:
                raise fatal_error(fault, self._budget_s)

    def _only_alone(self, op: str, split: str) -> None:
        order = self._order
        if order is not None and (self._on_host or not order.alone(self.rank)):
            self._refuse_fused(op, split)

    def _refuse_fused(self, op: str, split: str) -> NoReturn:
        raise SequenceError(
            f"{op} on virtual rank {self.rank}, which shares {self.device} with other ranks: its"
            f" receive would keep their sends from starting; call {split}() on every rank, then"
            " wait() on every result"
        )

    # ---- faults, budget, statistics -------------------------------------------------------------

    def check(self) -> None:
        """Raise what the device recorded; reads host memory, never synchronises.

        PeerTimeout, DesyncError or SequenceError stay until reset(). RoutingFault is raised once.
        """
        fault = self._read_fault(self._fault)
        if fault is not None:
            raise fatal_error(fault, self._budget_s)
        routing = self._read_routing(self._fault)
        if routing is not None and routing.count != self._routing_told:
            # Counted, not cleared: a fatal fault recorded meanwhile must not be lost.
            dropped, self._routing_told = routing.count - self._routing_told, routing.count
            raise routing_error(routing, dropped)

    @property
    def time_budget_s(self) -> float:
        """Seconds that an operation waits for a peer."""
        return self._budget_s

    def set_time_budget(self, seconds: float) -> None:
        """Bound every wait from now on, replays included. Synchronises; not for captured code."""
        if not seconds > 0:
            raise SequenceError(f"time budget {seconds!r} s: it must be above 0")
        self._ops.native.set_time_budget(int(seconds * 1e9))
        self._budget_s = seconds

    def steady(self) -> None:
        """Kernels are loaded everywhere: go from the warm-up budget to the steady one."""
        self.set_time_budget(env.read().timeout_s)

    def stats(self, chain: int = 0) -> StepStats:
        """What `chain` moved since its statistics were last zeroed. Synchronises."""
        values = self._ops.native.read_stats(chain)
        return StepStats(**{field.name: values[field.name] for field in fields(StepStats)})

    def stats_region(self, chain: int) -> tuple[int, int]:
        """(address, bytes) of the chain's statistics: local memory, which a reset node zeroes."""
        layout = layout_of(self.config, self.num_ranks)
        offset = layout.stats_offset + chain * layout.stats_stride
        return self._memory.local + offset, layout.stats_bytes

    def epochs(self, chain: int = 0) -> tuple[int, int]:
        """(dispatched, combined) of the chain's device words. Synchronises; for diagnosis."""
        return self._ops.native.read_state(chain)

    # ---- life -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything in flight and every fault. Collective, synchronises.

        Ranks of processes meet before and after; virtual ranks are reset one by one, all of them
        before the next operation. Raises PeerTimeout if a rank does not come.
        """
        self._ops.synchronize()
        self.world.barrier()
        self._ops.native.reset()
        _C.clear_faults(self._fault)
        self._routing_told = 0
        self._open = [None] * self.config.num_chains
        if self._order is not None:
            self._order.forget(self.rank)
        self.set_time_budget(self._budget_s)
        self.world.barrier()

    def close(self) -> None:
        """Give the memory back; again: nothing. Waits a bounded time for the peers to close too."""
        self._close(with_peers=True)

    def _close(self, with_peers: bool) -> None:
        if self._closed:
            return
        self._closed = True
        healthy = with_peers and self._read_fault(self._fault) is None
        if healthy:
            self._ops.synchronize()
        self._memory.close(self._meet if healthy else lambda: False)

    def _meet(self) -> bool:
        self.world.timeout_s = min(self.world.timeout_s, CLOSE_TIMEOUT_S)
        try:
            self.world.barrier()
        except EpError as error:
            log.warning("closing without the peers: %s", error)
            return False
        return True

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the peers may be elsewhere: do not wait for them.
        self._close(with_peers=kind is None)

    def __repr__(self) -> str:
        return (
            f"Buffer(rank {self.rank} of {self.num_ranks}, {self.device}, {self.memory_kind},"
            f" {self.config})"
        )
