"""Dispatch and combine of thousands of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ep_runtime.connect import Backend, choose_device, provide
from ep_runtime.memory import RankMemory
from ep_runtime.normal.config import BetweenNodes, NormalConfig, block_bytes, inbox_bytes
from ep_runtime.normal.group import agree, control_sizes, most_sms, resolve_nodes
from ep_runtime.normal.handles import Layout, NormalHandle, NormalReceived
from ep_runtime.normal.nodes import NodePath
from ep_runtime.normal.nodes_build import (
    Ground,
    Memory,
    data_sizes,
    join_nodes,
    prepare_ground,
)
from ep_runtime.normal.nodes_flat import sum_by_nodes
from ep_runtime.normal.ops import Routes, Tables
from ep_runtime.normal.steps import NormalSteps
from ep_runtime.normal.tuned import TunedSms, tuned_num_sms
from ep_runtime.normal.validate import Rows
from ep_runtime.world import World


def _alone(_what: str, step: Callable[[], None]) -> None:
    """A step that no other process takes part in."""
    step()


class NormalBuffer(NormalSteps):
    """One rank's end of a group for prefill and training: thousands of tokens at a time.

    Building one is collective. Every rank issues the same sequence of operations, with no tokens
    where it has none. Operations run on the current stream.
    """

    def __init__(
        self,
        world: World,
        *,
        max_tokens: int,
        max_hidden: int = 7168,
        max_experts: int = 1024,
        max_topk: int = 32,
        pool_bytes: int | None = None,
        ranks_per_node: int | None = None,
        between_nodes: BetweenNodes = "auto",
        num_sms: int | None = None,
        backend: Backend = "auto",
        device: torch.device | int | str | None = None,
    ) -> None:
        """Join the group. Collective.

        max_tokens .. between_nodes  see NormalConfig; the same on every rank
        num_sms  most SMs an operation uses, where the call does not say; None: what
                 `ep-runtime tune` found for this GPU and number of ranks, or else 24
        backend  "host", "cuda", or "auto": CUDA where torch and the native module have it
        device   the GPU; default: torch's current one. None, or the CPU, with "host"
        Raises ConfigError on every rank if configurations differ (naming ranks and fields) or the
        backend does not run on `device`, BuildError where this machine lacks what it takes (a GPU
        that was named with "auto" among it), PeerTimeout if a rank does not come, and GroupFault
        where another rank failed with an error that is not of this package.
        """
        place = world.agree("choosing the backend", lambda: choose_device(backend, device))
        config = world.agree(
            "reading the configuration",
            lambda: NormalConfig(
                max_tokens=max_tokens,
                max_hidden=max_hidden,
                max_experts=max_experts,
                max_topk=max_topk,
                pool_bytes=pool_bytes,
                ranks_per_node=ranks_per_node,
                between_nodes=between_nodes,
            ),
        )
        config = resolve_nodes(config, world)
        kind, neighbours = agree(config, world, place)
        if num_sms is None:
            sms = world.agree("reading tuned SMs", lambda: tuned_num_sms(world.num_ranks, place))
        else:
            sms = TunedSms(num_sms, num_sms)
        self._build(
            config,
            world,
            place,
            lambda some, sizes: provide(kind, sizes, some, place),
            sms,
            most_sms(place, neighbours),
            world.agree,
        )

    @classmethod
    def _virtual(
        cls,
        config: NormalConfig,
        world: World,
        device: torch.device,
        memory: Memory,
        num_sms: TunedSms,
        max_sms: int,
    ) -> NormalBuffer:
        self = cls.__new__(cls)
        self._build(config, world, device, memory, num_sms, max_sms, _alone)
        return self

    _nodes: NodePath | None = None

    def _build(
        self,
        config: NormalConfig,
        world: World,
        device: torch.device,
        memory: Memory,
        num_sms: TunedSms,
        max_sms: int,
        together: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """together  runs a step and raises on every rank if it failed on any: also the barriers,
        since nobody may send before every heap is zeroed and mapped."""
        ground = None
        if config.layered(world.num_ranks):
            ground = prepare_ground(config, world, device, memory)
            control, data = ground.control, ground.data
        else:
            control = memory(world, control_sizes(config, world.num_ranks))
            data = memory(world, data_sizes(config.heap_sizes(world.num_ranks).total))

        def provider(num_bytes: int) -> RankMemory:
            return memory(world, data_sizes(num_bytes))

        together(
            "allocating",
            lambda: self._assemble(
                config, world, device, control, data, provider, num_sms, max_sms
            ),
        )
        if ground is not None:
            there = ground
            together("joining the nodes", lambda: self._join_nodes(there, memory))

    def _join_nodes(self, ground: Ground, memory: Memory) -> None:
        self._nodes, self._parts = join_nodes(self, ground, memory)

    def _reset_wire(self) -> None:
        if self._nodes is not None:
            self._nodes.rails.reset()

    # ---- operations -----------------------------------------------------------------------------

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        """Count where this rank's tokens go. Does not communicate; capturable.

        topk_idx  [T, K] int64 or int32, contiguous; -1 is no expert; T up to 2^20
        An expert number out of range counts as -1 and makes the next call raise RoutingFault.
        Raises ShapeError.
        """
        self.check()
        self._check.experts(num_experts)
        self._check.routes(topk_idx)
        self._streams.enter()  # it counts in the device memory that dispatches count in
        return self._layout(topk_idx, num_experts)

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        num_experts: int | None = None,
        layout: Layout | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        num_sms: int | None = None,
    ) -> NormalReceived:
        """Send each token's row once to each rank that owns one of its experts.

        x                 [T, H] bf16, or (x, scales): x of one-byte elements (FP8) [T, H], scales
                          float32 or int32 [T, G] or [T], any strides; unit stride in H, rows of
                          a multiple of 16 bytes, at most 32 KiB, 16-byte aligned
        topk_idx          [T, K] int64 or int32; -1 is no expert. None: the layout alone says
                          where rows go, and no top-k is sent
        topk_weights      [T, K] float32, or None, alike on all ranks: that is not compared
        num_experts       E, a multiple of R; by default the layout's
        layout            what layout() gave for this topk_idx, where it was called before
        expert_alignment  recv_per_expert and recv_counts are rounded up to multiples of it
        num_worst_tokens  0: exactly as many rows as arrive, and one wait of the host for that
                          number. Else that many rows, no wait, capturable: rows after the last
                          one that arrived have topk_idx -1. The same on every rank. R times the
                          most tokens of any rank always suffices; where more rows arrive, all
                          ranks get DesyncError (once the device has recorded it) and the result
                          is undefined
        num_sms           most SMs to use; None: the buffer's
        T may differ between ranks and be 0; in worst-case mode it is at most max_tokens. Gradients
        end here: dispatch_autograd() is the version with gradients.
        Raises ShapeError or CaptureError before anything is launched, RoutingFault for an earlier
        call's experts, PeerTimeout or DesyncError as recorded by the device.
        """
        self.check()
        rows = self._check.rows(x)
        experts, routes = self._routes(rows, topk_idx, topk_weights, num_experts, layout)
        self._check.alignment(expert_alignment)
        self._check.worst_tokens(num_worst_tokens)
        sms = self._sms(num_sms, self.num_sms.dispatch)
        if num_worst_tokens:
            self._prepare_worst(rows, routes, num_worst_tokens)
        else:
            self._refuse_capture()
        if self._nodes is not None:
            self._check.most_tokens(rows.num_tokens, self.config.max_tokens)
        self._enter()
        if layout is None:
            assert topk_idx is not None  # _routes saw to it
            layout = self._layout(topk_idx, experts)
        if self._nodes is not None:
            return self._nodes.dispatch(
                rows, routes, layout, experts, expert_alignment, num_worst_tokens, sms
            )
        if num_worst_tokens:
            return self._dispatch_worst(
                rows, routes, layout, experts, expert_alignment, num_worst_tokens, sms
            )
        return self._dispatch_exact(rows, routes, layout, experts, expert_alignment, sms)

    def dispatch_cached(
        self,
        x: Rows,
        handle: NormalHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        num_sms: int | None = None,
    ) -> NormalReceived:
        """Send other rows the way of an earlier dispatch: no counting, no wait, capturable.

        x             [T, H] as dispatch() takes it, T of the handle
        handle        of a dispatch of this buffer; of the same one on every rank, which is not
                      compared
        topk_weights  [T, K] float32: arrive whole at every rank that a token goes to; or None
        Rows arrive where they did in the first dispatch. Gradients end here: dispatch_autograd()
        and combine_autograd() are the versions with gradients. Raises as dispatch() does.
        """
        self.check()
        rows = self._check.rows(x)
        self._check.handle(handle, rows.num_tokens)
        topk = 0
        if topk_weights is not None:
            self._check.weights(topk_weights, rows.num_tokens)
            topk = topk_weights.shape[1]
        sms = self._sms(num_sms, self.num_sms.dispatch)
        routes = Routes(None, topk_weights, topk)
        if self._nodes is not None:
            return self._nodes.dispatch_cached(rows, routes, handle, sms)
        self._make_room(block_bytes(handle.most_rows, rows.row_bytes, rows.num_scales, topk), 0)
        self._enter()
        return self._send(rows, routes, handle, [], None, sms)

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring rows home: out[t] = bias + the sum over ranks of what they made of token t.

        x             [N, H] bf16, one row per received row, unit stride in H, rows 16-byte aligned
        handle        of the dispatch, any number of times; of the same one on every rank, which is
                      not compared (in low-latency combines it is)
        topk_weights  [N, K] float32, summed over ranks like the rows; or None
        bias          one or two bf16 [T, H], contiguous
        out           [T, H] bf16, contiguous, apart from the memory of x and topk_weights, and of a
                      bias but where it is that very bias, without requires_grad where gradients are
                      recorded; allocated if None
        Returns (out, weights [T, K] float32 or None). Unweighted; FP32 sum of the biases, then the
        ranks in order, rounded once: equal inputs give equal bits. A token that went nowhere gets
        the bias or zeros. Gradients end here: combine_autograd() is the version with gradients.
        Capturable. Raises as dispatch() does.
        """
        self.check()
        self._check.handle(handle)
        stride, hidden = self._check.combined_rows(x, handle)
        shape = (handle.num_tokens, hidden)
        biases = self._check.bias(bias, shape)
        topk = 0
        if topk_weights is not None:
            remedy = "pass one row per received row, as received.topk_weights has them"
            self._check.weights(topk_weights, handle.num_rows, None, remedy)
            topk = topk_weights.shape[1]
        overwritten = None
        if out is not None:
            self._check.out(out, shape, x, topk_weights, biases)
            overwritten = out if torch.is_grad_enabled() else None
        sms = self._sms(num_sms, self.num_sms.combine)
        self.stats.combines += 1
        if out is None:
            out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        weights = None
        if topk_weights is not None:
            weights = torch.empty(
                (handle.num_tokens, topk), dtype=torch.float32, device=self.device
            )
        if self._nodes is not None:
            self._nodes.combine(x, stride, handle, topk_weights, topk, biases, out, weights, sms)
            _tell_autograd(overwritten)
            return out, weights
        self._make_room(0, inbox_bytes(handle.inbox_rows, hidden, topk))
        tables = Tables(handle.rank_prefix, handle.send_position)

        def add_up(
            along: Tables,
            bias: list[torch.Tensor],
            into: torch.Tensor,
            into_weights: torch.Tensor | None,
        ) -> None:
            self._enter()
            self._ops.combine(
                x,
                stride,
                topk_weights,
                topk,
                bias,
                along,
                handle.num_tokens,
                self._heap.sizes.inbox_offset,
                into,
                into_weights,
                sms,
            )
            self._after()

        if self.config.num_nodes(self.num_ranks) == 1:
            add_up(tables, biases, out, weights)
        else:
            sum_by_nodes(
                lambda along, some, its: add_up(along, [], some, its),
                tables,
                self.num_ranks // self.config.num_nodes(self.num_ranks),
                biases,
                out,
                weights,
            )
        _tell_autograd(overwritten)
        return out, weights


def _tell_autograd(overwritten: torch.Tensor | None) -> None:
    """A backward pass that saved what was in this tensor has to find out; torch did not see it."""
    if overwritten is not None and not overwritten.is_inference():  # those have no version
        torch.autograd.graph.increment_version(overwritten)
