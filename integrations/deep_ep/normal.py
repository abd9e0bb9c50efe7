"""DeepEP's normal calls on ep_runtime.normal.NormalBuffer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from ep_runtime import env
from ep_runtime.connect import host_id
from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.integrations.deep_ep.events import EventOverlap, check_async
from ep_runtime.integrations.deep_ep.place import Place
from ep_runtime.normal import Layout, NormalBuffer, NormalHandle, NormalReceived
from ep_runtime.normal.validate import require_tensor
from ep_runtime.world import World

T = TypeVar("T")
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Bias = torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None]
Flow = tuple[EventOverlap | None, bool, bool]  # previous_event, async, allocate on comm stream

MIN_TOKENS = 128
DEFAULT_HIDDEN = 7168  # until a row was seen; larger ones make the memory grow


class DispatchHandle(tuple[torch.Tensor, ...]):
    """DeepEP's handle of a dispatch within a node, for combine and cached dispatches.

    rank_prefix_matrix          int32 [R, R]: [s, d] tokens from ranks 0 .. s to rank d
    channel_prefix_matrix       int32 [R, 1]: tokens that this rank sends to each
    recv_channel_prefix_matrix  int32 [R, 1]: zeros; there is one channel, with all rows
    recv_src_idx                int32 [N]: token at its source of each received row
    is_token_in_rank            bool [T, R]
    send_head                   int32 [T, R]: the token's index among those to that rank, or -1

    recv_src_idx lies in the dispatch's receive memory, apart from the rows: keeping the handle
    keeps no rows.
    """

    routing: NormalHandle

    @staticmethod
    def make(layout: Layout, received: NormalReceived) -> DispatchHandle:
        routing = received.handle
        sent = layout.tokens_per_rank.unsqueeze(1)
        handle = DispatchHandle(
            (
                routing.rank_prefix,
                sent,
                torch.zeros_like(sent),
                received.source_token,
                routing.is_token_in_rank,
                routing.send_position,
            )
        )
        handle.routing = routing
        return handle


class InternodeHandle(DispatchHandle):
    """DeepEP's handle of a dispatch between N nodes of G ranks, with one channel.

    is_token_in_rank                     bool [T, R]
    rdma_channel_prefix_matrix           int32 [N, 1]: tokens that this rank sends to each node
    gbl_channel_prefix_matrix            int32 [R, 1]: tokens that this rank sends to each rank
    recv_rdma_channel_prefix_matrix      int32 [N, 1]: zeros
    recv_rdma_rank_prefix_sum            int32 [N]: rail rows from nodes 0 .. n
    recv_gbl_channel_prefix_matrix       int32 [R, 1]: zeros
    recv_gbl_rank_prefix_sum             int32 [R]: received rows from ranks 0 .. r
    recv_src_meta                        int32 [rows]: token at its source of each received row
    send_rdma_head                       int32 [T, N]: index among the tokens to that node, or -1
    send_nvl_head                        int32 [rail rows, G]: the same within the node
    """

    @staticmethod
    def make(layout: Layout, received: NormalReceived) -> DispatchHandle:
        routing = received.handle
        nodes = routing.nodes
        assert nodes is not None, "a group that spans nodes"
        rail, tokens = nodes.rail, layout.tokens_per_rank
        node = nodes.node
        rank = node * nodes.target.shape[1] + nodes.local
        to_nodes = rail.prefix[node : node + 1].t().contiguous()
        if node:
            to_nodes = to_nodes - rail.prefix[node - 1].unsqueeze(1)
        handle = InternodeHandle(
            (
                routing.is_token_in_rank,
                to_nodes,
                tokens.unsqueeze(1),
                torch.zeros_like(to_nodes),
                rail.prefix[:, node].contiguous(),
                torch.zeros_like(tokens).unsqueeze(1),
                routing.rank_prefix[:, rank].contiguous(),
                received.source_token,
                rail.position,
                nodes.node_position,
            )
        )
        handle.routing = routing
        return handle


class Normal:
    """All normal calls of one deep_ep Buffer. Dispatch and combine are collective."""

    def __init__(self, place: Place, pool_bytes: int) -> None:
        self._place = place
        self._pool_bytes = pool_bytes
        self._own_tensors = env.read().own_tensors
        self._buffer: NormalBuffer | None = None
        self._ranks_per_node: int | None = None

    @property
    def ranks_per_node(self) -> int | None:
        """Of a group that spans nodes; None where it does not. Found out by the first call."""
        return self._ranks_per_node

    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, flow: Flow
    ) -> tuple[Layout, torch.Tensor | None, EventOverlap]:
        """See Buffer.get_dispatch_layout: (layout, tokens per node or None, event)."""
        require_tensor("topk_idx", topk_idx)
        if topk_idx.dim() != 2:
            raise ShapeError(f"topk_idx is {list(topk_idx.shape)}: it must be [T, K]")
        buffer = self._get(topk_idx, topk_idx.shape[0], DEFAULT_HIDDEN)

        def step() -> tuple[Layout, torch.Tensor | None]:
            found = buffer.layout(topk_idx, num_experts)
            return found, self._per_node(found)

        (found, per_node), event = self._run(
            step,
            flow,
            [topk_idx],
            lambda made: [
                made[0].tokens_per_rank,
                made[0].tokens_per_expert,
                made[0].is_token_in_rank,
                made[1],
            ],
        )
        return found, per_node, event

    def _per_node(self, found: Layout) -> torch.Tensor | None:
        """int32 [N]: tokens that go to each node, each counted once."""
        per_node = self._ranks_per_node
        if per_node is None:
            return None
        goes = found.is_token_in_rank
        return goes.view(-1, goes.shape[1] // per_node, per_node).any(2).sum(0, dtype=torch.int32)

    def dispatch(
        self,
        x: Rows,
        layout: Layout,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
        flow: Flow,
    ) -> tuple[NormalReceived, DispatchHandle, EventOverlap]:
        """See Buffer.dispatch, without a handle."""
        rows = _rows(x)
        buffer = self._get(rows, rows.shape[0], rows.shape[1])
        if num_worst_tokens:
            self._reserve(buffer, rows.shape[0], num_worst_tokens)

        def step() -> tuple[NormalReceived, DispatchHandle]:
            received = buffer.dispatch(
                x,
                topk_idx,
                topk_weights,
                layout=layout,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                num_sms=num_sms,
            )
            kind = InternodeHandle if received.handle.nodes is not None else DispatchHandle
            return received, kind.make(layout, received)

        (received, handle), event = self._run(
            step,
            flow,
            [
                *_tensors(x),
                topk_idx,
                topk_weights,
                layout.tokens_per_rank,
                layout.tokens_per_expert,
                layout.is_token_in_rank,
            ],
            lambda done: [*_outputs(done[0]), *done[1]],
        )
        return received, handle, event

    def dispatch_cached(
        self, x: Rows, handle: DispatchHandle, num_sms: int, flow: Flow
    ) -> tuple[NormalReceived, EventOverlap]:
        """See Buffer.dispatch, with a handle."""
        routing = _routing(handle)
        rows = _rows(x)
        buffer = self._get(rows, rows.shape[0], rows.shape[1])
        return self._run(
            lambda: buffer.dispatch_cached(x, routing, num_sms=num_sms),
            flow,
            [*_tensors(x), *handle],
            _outputs,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None,
        bias: Bias | None,
        num_sms: int,
        flow: Flow,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """See Buffer.combine."""
        routing = _routing(handle)
        buffer = self._get(x, 0, DEFAULT_HIDDEN)
        given = bias if isinstance(bias, tuple) else (bias,)
        biases = tuple(one for one in given if one is not None)
        (out, weights), event = self._run(
            lambda: buffer.combine(
                x, routing, topk_weights=topk_weights, bias=biases, num_sms=num_sms
            ),
            flow,
            [x, *handle, topk_weights, *biases],
            list,
        )
        return out, weights, event

    def close(self) -> None:
        """Give the memory back. Collective."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()

    # ---- parts ----------------------------------------------------------------------------------

    def _run(
        self,
        step: Callable[[], T],
        flow: Flow,
        inputs: Sequence[torch.Tensor | None],
        outputs: Callable[[T], Sequence[torch.Tensor | None]],
    ) -> tuple[T, EventOverlap]:
        previous_event, async_finish, allocate_on_comm_stream = flow
        check_async(previous_event, async_finish, allocate_on_comm_stream)
        result, event = self._place.run(step, previous_event, async_finish)
        if async_finish:
            made = [t for t in outputs(result) if t is not None]
            used = [t for t in inputs if t is not None]
            self._place.comm.lend(used, made)
            event.extra_tensors = [*used, *made]
        return result, event

    def _get(self, tensor: torch.Tensor, tokens: int, hidden: int) -> NormalBuffer:
        if self._buffer is None:
            if not self._pool_bytes:
                raise ConfigError(
                    "a normal call on a Buffer with num_nvl_bytes=0: build it with the bytes that"
                    " Config.get_nvl_buffer_size_hint() gives"
                )
            self._buffer = self._build(tensor, tokens, hidden)
        return self._buffer

    def _build(self, tensor: torch.Tensor, tokens: int, hidden: int) -> NormalBuffer:
        """Collective. Sizes that fit the ranks' first call; later ones may be larger."""
        place, world = self._place, self._place.world
        device = place.on(tensor).device
        place.refuse_capture("the first normal call", "make an eager one")
        card = json.dumps([tokens, hidden, self._own_tensors])
        told = [json.loads(text) for text in world.all_gather(card.encode())]
        most_tokens, most_hidden, _ = (max(column) for column in zip(*told, strict=True))
        if len({own for *_, own in told}) > 1:
            raise ConfigError(
                f"EP_OWN_TENSORS differs between ranks: {[own for *_, own in told]}; set the same"
            )
        self._ranks_per_node = nodes_of(world)
        backend: Literal["cuda", "host"] = "cuda" if device.type == "cuda" else "host"
        return NormalBuffer(
            world,
            max_tokens=max(MIN_TOKENS, 1 << (max(most_tokens, 1) - 1).bit_length()),
            max_hidden=max(most_hidden, DEFAULT_HIDDEN),
            # Without a pool, all that is received is copied into tensors whose storage is theirs.
            pool_bytes=0 if self._own_tensors else self._pool_bytes,
            ranks_per_node=self._ranks_per_node,
            backend=backend,
            device=device if backend == "cuda" else None,
        )

    def _reserve(self, buffer: NormalBuffer, tokens: int, num_worst_tokens: int) -> None:
        """Room for a worst-case dispatch: every rank knows it from num_worst_tokens alone."""
        share = -(-num_worst_tokens // buffer.num_ranks)
        if share > buffer.config.max_tokens:
            buffer.reserve(max_tokens=share)
        if tokens > buffer.config.max_tokens:
            raise ShapeError(
                f"x has {tokens} rows with num_worst_tokens={num_worst_tokens}: a rank may send at"
                f" most {buffer.config.max_tokens} of them; pass {buffer.num_ranks} times the most"
                " tokens of any rank"
            )


def nodes_of(world: World) -> int | None:
    """Ranks of a node, if the group spans nodes: EP_RANKS_PER_NODE, or else the ranks of a host.
    Collective. Raises ConfigError on every rank."""
    card = json.dumps([host_id(), env.read().ranks_per_node])
    told = [json.loads(text) for text in world.all_gather(card.encode())]
    hosts = [host for host, _ in told]
    asked = {given for _, given in told}
    if len(asked) > 1:
        raise ConfigError(
            f"EP_RANKS_PER_NODE differs between ranks: {[given for _, given in told]}; set the same"
        )
    wanted: int | None = asked.pop()
    if wanted is None:
        wanted = hosts.count(hosts[0])
        whole = [host for host in dict.fromkeys(hosts) for _ in range(wanted)]
        if hosts != whole:
            raise ConfigError(
                f"the group's {len(hosts)} ranks are on {len(set(hosts))} hosts in no order of"
                " nodes: give every host the same number of ranks, next to each other"
            )
    return wanted if wanted < world.num_ranks else None


def _routing(handle: DispatchHandle) -> NormalHandle:
    if not isinstance(handle, DispatchHandle):
        raise ShapeError(
            f"handle is a {type(handle).__name__}: pass the handle that dispatch returned, itself"
        )
    return handle.routing


def _tensors(rows: Rows) -> tuple[torch.Tensor, ...]:
    return (rows,) if isinstance(rows, torch.Tensor) else tuple(rows)


def _rows(x: Rows) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) and not (isinstance(x, tuple) and len(x) == 2):
        raise ShapeError(
            f"x is {type(x).__name__}: pass rows [T, H], or a tuple of rows and scales"
        )
    rows = _tensors(x)[0]
    require_tensor("x", rows)
    if rows.dim() != 2:
        raise ShapeError(f"x is {list(rows.shape)}: it must be [T, H]; reshape the rows")
    return rows


def _outputs(received: NormalReceived) -> list[torch.Tensor | None]:
    return [received.x, received.scales, received.topk_idx, received.topk_weights]
