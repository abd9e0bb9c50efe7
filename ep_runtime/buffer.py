"""Dispatch and combine of one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.call_order import CallOrder
from ep_runtime.config import CombineFormat, EpConfig
from ep_runtime.connect import Backend, choose_device, connect
from ep_runtime.errors import ShapeError
from ep_runtime.handles import Handle, Received
from ep_runtime.layout import WIRE
from ep_runtime.memory import RankMemory
from ep_runtime.native import _C
from ep_runtime.order import SendOrder
from ep_runtime.pending import Pending
from ep_runtime.receive import ReceiveBuffer
from ep_runtime.validate import apart
from ep_runtime.world import World


@dataclass(slots=True)
class _Dispatch:
    """A dispatch that was checked and not launched yet."""

    chain: int
    inputs: _C.SendInput
    target: _C.RecvTarget
    handle: Handle
    into: ReceiveBuffer
    adds_to: tuple[torch.Tensor | None, ...]  # kept until the receive, which writes there


@dataclass(slots=True)
class _Combine:
    """A combine that was checked and not launched yet."""

    handle: Handle
    inputs: _C.CombineInput
    output: _C.CombineOutput
    result: torch.Tensor
    adds_to: torch.Tensor | None


class Buffer(CallOrder):
    """One rank's end of the group: its heap, its chains, and the operations on them.

    Building one is collective. All state of a step lives on the device, so captured operations
    may be replayed in any order, as long as every rank runs the same sequence on a chain. On a
    chain any order of dispatches and combines is legal; of each kind one send may wait for its
    receive.

    On a GPU operations run on the current stream of each call. Those of one chain must run in the
    order in which they were called, sends and waits alike: calls on one stream do; across streams
    the caller orders them with events. Chains on streams of their own share the GPU: a receive may
    fill it, and keep another chain's send, which a peer waits for, from starting. Let every send
    begin before any receive (events between them), or set EP_NUM_SMS so that those which wait at
    the same time fit side by side.
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
        device   the GPU; default: torch's current one. None, or the CPU, with "host"
        Raises ConfigError on every rank if configurations differ (naming ranks and fields) or the
        backend does not run on `device`, BuildError where this machine lacks what it takes (a GPU
        that was named with "auto" among it), PeerTimeout if a rank does not come, and GroupFault
        where another rank failed with an error that is not of this package.
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
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        chain: int = 0,
        num_tokens: torch.Tensor | None = None,
        expected_tokens: int | None = None,
        out: ReceiveBuffer | None = None,
        round_scale: bool | None = None,
        cumulative_recv_count: torch.Tensor | None = None,
        wait_ns: torch.Tensor | None = None,
    ) -> Pending[Received]:
        """Send each token's row to the ranks that own its experts.

        x                [T, H] bf16, T <= max_tokens, unit stride in H, rows 16-byte aligned;
                         "opaque": [T, n] of any dtype whose n elements are opaque_row_bytes
        topk_idx         [T, K] int64 or int32; -1 is no expert, each expert once per token
        topk_weights     [T, K] float32. None, on every rank: each combine brings them (not with
                         "compact", nor on virtual ranks that share a device)
        scales           "opaque" with scale words: [T, words] of a 4-byte dtype, any strides
        num_tokens       int32 scalar on the device: rows from it on are never sent; None: T. Each
                         combine of the handle reads it again: it must keep its value until then
        expected_tokens  most tokens any rank sends now: sizes the launch, any value is correct
        out              receive tensors of `new_receive`, which decide the format of the rows, the
                         same on every rank; None: the chain's own, in the configuration's format.
                         What is in flight must not need them
        round_scale      scales of FP8 rows are powers of two (into UE8M0 scales they always are;
                         other rows have none); None: the configuration's choice
        cumulative_recv_count  int32 [L], contiguous: += the rows of each local expert
        wait_ns          int64 [R], contiguous: += nanoseconds that each source kept this rank
                         waiting
        Capturable. T may differ between ranks and be 0. Raises ShapeError or SequenceError before
        anything is launched, and what check() raises; RoutingFault where nothing else is in flight.
        """
        self._check_before_dispatch()
        call = self._prepare_dispatch(
            "dispatch", x, topk_idx, topk_weights, scales, chain, num_tokens, expected_tokens, out,
            round_scale, cumulative_recv_count, wait_ns,
        )  # fmt: skip
        self._tell("dispatch_send", chain)
        call.into.take()
        self._ops.dispatch_send(chain, call.inputs)
        if self._order is not None:
            self._order.sent(self.rank, "dispatch", chain)

        def finish(pending: Pending[Received]) -> Received:
            self._before_wait("dispatch_recv", pending)
            self._ops.dispatch_recv(chain, call.target, call.handle.expected_tokens)
            self._after_host_wait()
            return call.into.hand_out(call.handle)

        pending = Pending("dispatch", chain, call.handle.uses, finish)
        self._open["dispatch", chain] = pending
        return pending

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        wait_ns: torch.Tensor | None = None,
        combine_format: CombineFormat | None = None,
    ) -> Pending[torch.Tensor]:
        """Bring expert results home: out[t] = sum over k of weight[t, k] * y(expert of k, t).

        y             bf16 [..., H] with a row for each row of Received.x, unit stride in H.
                      "compact": one row per message, already weighted and summed over this rank's
                      experts
        handle        of the dispatch; any number of combines may use it
        topk_weights  [T, K] float32, if and only if the dispatch had none: they travel ahead of
                      the rows, which wait for them
        out           [T, H] bf16, contiguous; allocated if None. A token without experts gets zeros
        wait_ns       int64 [R], contiguous: += nanoseconds that each rank kept this one waiting
        combine_format  of each rank's sums, the same on every rank; None: the configuration's; one
                      with "bf16" also takes "fp8"
        The order of additions is fixed: equal inputs give equal bits. FP32 inside, rounded to
        combine_format once per rank (this one included) and to BF16 at the end. Capturable. Raises
        as dispatch() does, but no RoutingFault, and ConfigError for a format that there is not.
        """
        self._check_fatal()
        call = self._prepare_combine(
            "combine", y, handle, topk_weights, out, wait_ns, combine_format
        )
        chain = handle.chain
        self._tell("combine_send", chain)
        self._ops.combine_send(chain, call.inputs, handle.expected_tokens)
        if self._order is not None:
            self._order.sent(self.rank, "combine", chain)

        def finish(pending: Pending[torch.Tensor]) -> torch.Tensor:
            self._before_wait("combine_recv", pending)
            self._ops.combine_recv(chain, call.output)
            self._after_host_wait()
            return call.result

        pending = Pending("combine", chain, handle.uses, finish)
        self._open["combine", chain] = pending
        return pending

    def dispatch_fused(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        chain: int = 0,
        num_tokens: torch.Tensor | None = None,
        expected_tokens: int | None = None,
        out: ReceiveBuffer | None = None,
        round_scale: bool | None = None,
        cumulative_recv_count: torch.Tensor | None = None,
        wait_ns: torch.Tensor | None = None,
    ) -> Received:
        """dispatch() and wait() in one kernel. Capturable. x is apart from what is received.

        Raises SequenceError on virtual ranks that share a device: one's receive would keep the
        other's send from starting.
        """
        self._check_before_dispatch()
        self._only_alone("dispatch_fused", "dispatch")
        call = self._prepare_dispatch(
            "dispatch_fused", x, topk_idx, topk_weights, scales, chain, num_tokens,
            expected_tokens, out, round_scale, cumulative_recv_count, wait_ns,
        )  # fmt: skip
        apart("x", x, "what is received", call.into.received.x)
        self._tell("dispatch_fused", chain)
        call.into.take()
        self._ops.dispatch_fused(chain, call.inputs, call.target, call.handle.expected_tokens)
        self._after_host_wait()
        return call.into.hand_out(call.handle)

    def combine_fused(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        wait_ns: torch.Tensor | None = None,
        combine_format: CombineFormat | None = None,
    ) -> torch.Tensor:
        """combine() and wait() in one kernel. Capturable. y is apart from out.

        Raises as dispatch_fused() does.
        """
        self._check_fatal()
        self._only_alone("combine_fused", "combine")
        call = self._prepare_combine(
            "combine_fused", y, handle, topk_weights, out, wait_ns, combine_format
        )
        if out is not None:
            apart("out", out, "y", y)
        self._tell("combine_fused", handle.chain)
        self._ops.combine_fused(handle.chain, call.inputs, call.output, handle.expected_tokens)
        self._after_host_wait()
        return call.result

    # ---- checked arguments ----------------------------------------------------------------------

    def _prepare_dispatch(
        self,
        op: str,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        chain: int,
        num_tokens: torch.Tensor | None,
        expected_tokens: int | None,
        out: ReceiveBuffer | None,
        round_scale: bool | None,
        cumulative_recv_count: torch.Tensor | None,
        wait_ns: torch.Tensor | None,
    ) -> _Dispatch:
        stride = self._checker.dispatch(
            x, topk_idx, topk_weights, scales, chain, num_tokens, expected_tokens, out
        )
        self._checker.statistics(cumulative_recv_count, wait_ns)
        if topk_weights is None:
            self._refuse_late_weights(op)
        self._claim(op, "dispatch", chain)
        into = self._inboxes[chain] if out is None else out
        self._require_free(op, chain, into)
        if round_scale is None:
            round_scale = self.config.round_scale
        elif type(round_scale) is not bool:
            raise ShapeError(f"round_scale={round_scale!r}: it must be True, False or None")
        handle = into.new_handle(
            chain, x.shape[0], num_tokens, expected_tokens or 0, topk_weights is None
        )
        inputs = _C.SendInput(
            self._shape,
            routing=handle.routing.data_ptr(),
            wire=WIRE[into.dispatch_format],
            round_scale=round_scale or into.scale_format == "ue8m0",
            x=x.data_ptr(),
            x_stride=stride,
            scales=0 if scales is None else scales.data_ptr(),
            scale_row_stride=0 if scales is None else scales.stride(0),
            scale_group_stride=0 if scales is None else scales.stride(1),
            topk_idx=topk_idx.data_ptr(),
            idx_bytes=topk_idx.element_size(),
            weights=0 if topk_weights is None else topk_weights.data_ptr(),
            num_tokens=x.shape[0],
            num_tokens_address=0 if num_tokens is None else num_tokens.data_ptr(),
        )
        target = into.target(cumulative_recv_count, wait_ns)
        adds_to = (cumulative_recv_count, wait_ns)
        return _Dispatch(chain, inputs, target, handle, into, adds_to)

    def _prepare_combine(
        self,
        op: str,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor | None,
        wait_ns: torch.Tensor | None,
        combine_format: CombineFormat | None,
    ) -> _Combine:
        stride = self._checker.combine(y, handle, topk_weights, out)
        wire = WIRE[self._checker.combine_format(combine_format)]
        self._checker.statistics(None, wait_ns)
        self._claim(op, "combine", handle.chain)
        result = self._out(handle) if out is None else out
        routing = handle.routing.data_ptr()
        inputs = _C.CombineInput(
            self._shape,
            routing=routing,
            wire=wire,
            y=y.data_ptr(),
            y_stride=stride,
            late_weights=handle.late_weights,
            weights=0 if topk_weights is None else topk_weights.data_ptr(),
            num_tokens=handle.num_rows,
        )
        output = _C.CombineOutput(
            self._shape,
            routing=routing,
            wire=wire,
            late_weights=handle.late_weights,
            out=result.data_ptr(),
            num_tokens=handle.num_rows,
            num_tokens_address=0 if handle.num_tokens is None else handle.num_tokens.data_ptr(),
            wait_ns=0 if wait_ns is None else wait_ns.data_ptr(),
        )
        return _Combine(handle, inputs, output, result, wait_ns)

    def _out(self, handle: Handle) -> torch.Tensor:
        return torch.empty(
            (handle.num_rows, self.config.hidden), dtype=torch.bfloat16, device=self.device
        )
