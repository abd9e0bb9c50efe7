"""Dispatch and combine of one rank."""

from __future__ import annotations

from typing import NoReturn

import torch

from ep_runtime.config import EpConfig
from ep_runtime.connect import Backend, choose_device, connect
from ep_runtime.errors import SequenceError
from ep_runtime.handles import Handle, Received
from ep_runtime.memory import RankMemory
from ep_runtime.order import SendOrder
from ep_runtime.pending import Pending
from ep_runtime.rank import OpKind, OpRecord, Rank
from ep_runtime.world import World


class Buffer(Rank):
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
        # Also the barrier: nobody sends before every heap is zeroed and mapped.
        world.agree("allocating", lambda: self._assemble(config, world, place, memory, None))

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
        self._tell("dispatch_send", chain)
        self._ops.dispatch_send(chain, x, stride, topk_idx, topk_weights, num_tokens)
        if self._order is not None:
            self._order.sent(self.rank, chain)
        handle = Handle(self._identity, chain, x.shape[0], num_tokens, expected_tokens or 0)

        def finish(pending: Pending[Received]) -> Received:
            self._tell("dispatch_recv", chain)
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
        self._tell("combine_send", chain)
        self._ops.combine_send(chain, y, stride, handle.expected_tokens)
        if self._order is not None:
            self._order.sent(self.rank, chain)

        def finish(pending: Pending[torch.Tensor]) -> torch.Tensor:
            self._tell("combine_recv", chain)
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
        self._tell("dispatch_fused", chain)
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
        self._tell("combine_fused", handle.chain)
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
        unfinished = self._open[chain]
        if unfinished is not None:
            raise SequenceError(
                f"{op} on chain {chain}: its last {unfinished.op} was not waited for; call wait()"
                " on what it returned, use another chain, or reset() on every rank to drop it"
            )

    def _tell(self, kind: OpKind, chain: int) -> None:
        """Let the recorder of a capture know what is launched next."""
        if self.recorder is not None:
            self.recorder(OpRecord(chain, kind))

    def _before_wait(self, pending: Pending[Received] | Pending[torch.Tensor]) -> None:
        if self._order is not None:
            self._order.before_wait(self.rank, pending.chain)
        pending.close()
        self._open[pending.chain] = None

    def _after_host_wait(self) -> None:
        """A host receive has already failed or not when it returns: say so now."""
        if self._on_host:
            self._check_fatal()

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
