"""Dispatch and combine where a group spans nodes: over rails, then within each node.

Rank n * G + l is rank l of node n. Its *rail* joins the ranks l of all nodes, its *node* the ranks
of node n. A token crosses once to each node that has one of its experts, to the rail's rank there;
that rank sends it on to the node's ranks that want it. What comes back is added up in the node
first and crosses as one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime import current
from ep_runtime.native import _C
from ep_runtime.normal.config import block_bytes, inbox_bytes
from ep_runtime.normal.handles import (
    Layout,
    NodeRouting,
    NormalHandle,
    NormalReceived,
    NormalStats,
    RailTables,
)
from ep_runtime.normal.node_shape import NodeShape
from ep_runtime.normal.ops import Routes, Tables, block_size
from ep_runtime.normal.rails import Rails
from ep_runtime.normal.receive import Target
from ep_runtime.normal.steps import NormalSteps
from ep_runtime.normal.validate import Outgoing


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a notify of a whole group with nodes made, and how many rows are coming.

    whole, rail  tables
    rows         rows that this rank receives, and most_rows that any rank does
    rail_rows    that this rank gets over its rail
    """

    whole: Tables
    rail: Tables
    rows: int
    most_rows: int
    per_expert: list[int]
    rail_rows: int


class NodePath:
    """The operations of a NormalBuffer whose group spans nodes.

    whole  the NormalBuffer: all ranks, who tell each other counts, and that they are there
    rails  how rows cross from node to node. Receive memory of the rail is the staging block of its
           heap, since nothing lies there beyond an operation
    node   where they spread; received tensors lie in its pool
    """

    def __init__(
        self, shape: NodeShape, whole: NormalSteps, rails: Rails, node: NormalSteps
    ) -> None:
        self._shape = shape
        self._whole = whole
        self.rails = rails
        self._rail = rails.part
        self._node = node

    @property
    def stats(self) -> NormalStats:
        """The whole buffer's."""
        return self._whole.stats

    def dispatch(
        self,
        rows: Outgoing,
        routes: Routes,
        layout: Layout,
        num_experts: int,
        alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> NormalReceived:
        """See NormalBuffer.dispatch."""
        exact = num_worst_tokens == 0
        # A rail's rank is told by topk_idx who in its node wants a token.
        unrouted = routes.topk_idx is None
        # Without it ranks take the place of experts, all of them: K is then R, beyond max_topk.
        experts = self._whole.num_ranks if unrouted else num_experts
        topk = experts if unrouted else routes.topk
        self.rails.check_out(rows.row_bytes, rows.num_scales, topk)
        if not exact:
            self._make_room(rows, topk, routes.topk, num_worst_tokens)
        self.stats.dispatches += 1
        self._enter()
        counts = self._whole._counts(num_experts)
        by_node, named = self._by_node(layout, name_ranks=unrouted)
        over_rails = Routes(named, None, topk) if unrouted else routes
        counted = self._count(
            rows, layout, by_node, num_experts, alignment, num_worst_tokens, counts
        )
        if exact:
            self._make_room(rows, topk, routes.topk, counted.most_rows)
        rail = self.rails.tables(counted.rail)
        arrived = self._cross(rows, over_rails, rail, counted.rail_rows, experts, exact, num_sms)
        nodes = self._tables(arrived, counted, rail, experts // self._shape.num_nodes)
        handle = NormalHandle(
            counted.whole.rank_prefix,
            counted.whole.send_position,
            layout.is_token_in_rank,
            rows.num_tokens,
            counted.rows,
            counted.most_rows,
            (self._whole.num_ranks - 1) * self._whole.config.max_tokens,
            num_experts,
            exact,
            self._whole._identity,
            nodes,
        )
        onward = Routes(arrived.topk_idx, arrived.topk_weights, routes.topk)
        if routes.topk_idx is None:
            onward = routes
        return self._spread(arrived, onward, handle, counted.per_expert, counts, num_sms)

    def dispatch_cached(
        self, rows: Outgoing, routes: Routes, handle: NormalHandle, num_sms: int
    ) -> NormalReceived:
        """See NormalBuffer.dispatch_cached. routes: weights at most."""
        nodes = _nodes_of(handle)
        self.rails.check_out(rows.row_bytes, rows.num_scales, routes.topk)
        self._make_room(rows, routes.topk, routes.topk, handle.most_rows)
        self.stats.dispatches += 1
        self._enter()
        self.rails.meet()
        arrived = self._cross(
            rows, routes, nodes.rail, nodes.rail_rows, handle.num_experts, handle.exact, num_sms
        )
        onward = Routes(None, arrived.topk_weights, routes.topk)
        return self._spread(arrived, onward, handle, [], None, num_sms)

    def combine(
        self,
        x: torch.Tensor,
        stride_bytes: int,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None,
        topk: int,
        biases: list[torch.Tensor],
        out: torch.Tensor,
        weights: torch.Tensor | None,
        num_sms: int,
    ) -> None:
        """See NormalBuffer.combine. Each node's sum crosses as a BF16 row (its weights as FP32)."""
        nodes, hidden = _nodes_of(handle), x.shape[1]
        self.rails.check_home(hidden, topk)
        self._grow(
            (0, inbox_bytes(nodes.rail_inbox_rows, hidden, topk)),
            (0, inbox_bytes(nodes.node_inbox_rows, hidden, topk)),
        )
        self._enter()
        self.rails.meet()
        home = self.rails.partial(nodes.rail_rows, hidden, None if weights is None else topk)
        self._node._ops.combine(
            x,
            stride_bytes,
            topk_weights,
            topk,
            [],
            Tables(nodes.node_prefix, nodes.node_position),
            nodes.rail_rows,
            self._node._heap.sizes.inbox_offset,
            home.rows,
            home.weights,
            num_sms,
            nodes.order,
        )
        self._node._after()
        self.rails.bring_home(home, nodes.rail, biases, handle.num_tokens, out, weights, num_sms)

    # ---- parts ----------------------------------------------------------------------------------

    def _make_room(self, rows: Outgoing, rail_topk: int, topk: int, most_rows: int) -> None:
        """Receive memory of a dispatch, on the rail (whatever comes fits) and in the node."""
        arriving = self._shape.num_nodes * self._whole.config.max_tokens
        size = (rows.row_bytes, rows.num_scales)
        self._grow(
            (block_bytes(arriving, *size, rail_topk), 0), (block_bytes(most_rows, *size, topk), 0)
        )

    def _grow(self, rail: tuple[int, int], node: tuple[int, int]) -> None:
        """Make room for so many bytes (received, coming home). All ranks come with the same.

        The rail and the node grow with their members alone, but nobody goes on before all have:
        what a rank launches next waits for others, and they wait for the device while they grow.
        """
        before = self.stats.growths
        self._rail._make_room(*rail)
        self._node._make_room(*node)
        if self.stats.growths != before:
            self._whole.world.barrier()

    def _enter(self) -> None:
        for one in (self._whole, self._rail, self._node):
            one._enter()

    def _count(
        self,
        rows: Outgoing,
        layout: Layout,
        by_node: Layout,
        num_experts: int,
        alignment: int,
        num_worst_tokens: int,
        counts: torch.Tensor,
    ) -> _Counted:
        """Tell all ranks how many tokens go to each, and the rail how many to each node."""
        shape, exact = self._shape, num_worst_tokens == 0
        of_node = torch.empty(
            num_experts // shape.num_nodes, dtype=torch.int32, device=counts.device
        )
        tokens = rows.num_tokens
        self.rails.announce(layout, by_node)
        whole = self._whole._announce(tokens, layout, num_experts, alignment, exact, counts)
        rail = self._rail._announce(tokens, by_node, num_experts, 1, exact, of_node)
        if not exact:
            arriving = shape.num_nodes * self._whole.config.max_tokens
            return _Counted(whole, rail, num_worst_tokens, num_worst_tokens, [], arriving)
        told = self._whole._learn_counts(counts.shape[0])
        railed = self._rail._learn_counts(of_node.shape[0])  # went out behind it: no second wait
        return _Counted(whole, rail, told.rows, told.most_rows, told.per_expert, railed.rows)

    def _by_node(self, layout: Layout, *, name_ranks: bool) -> tuple[Layout, torch.Tensor | None]:
        """(the layout with nodes for ranks, int32 [T, R] that names them where they are asked for).

        Kernels of our own: one that torch loads here for the first time could wait for another
        rank of this GPU, which waits for what comes behind it.
        """
        shape, device = self._shape, self._whole.device
        tokens, ranks = layout.is_token_in_rank.shape
        goes = torch.empty((tokens, shape.num_nodes), dtype=torch.bool, device=device)
        count = torch.empty(shape.num_nodes, dtype=torch.int32, device=device)
        named = None
        if name_ranks:
            named = torch.empty((tokens, ranks), dtype=torch.int32, device=device)
        addresses = (
            shape.num_nodes,
            shape.ranks_per_node,
            shape.rank,
            layout.is_token_in_rank.data_ptr(),
            tokens,
            goes.data_ptr(),
            count.data_ptr(),
            0 if named is None else named.data_ptr(),
        )
        if device.type == "cpu":
            _C.host_by_node(*addresses)
        else:
            stream = current.stream_handle(device)
            _C.cuda_by_node(*addresses, device.index, stream)
        return Layout(count, layout.tokens_per_expert, goes), named

    def _cross(
        self,
        rows: Outgoing,
        routes: Routes,
        tables: RailTables,
        rail_rows: int,
        num_experts: int,
        exact: bool,
        num_sms: int,
    ) -> NormalReceived:
        """Send each token once to each node. What arrives lies in the rail's staging block: it is
        gone with the rail's next dispatch. Experts are numbered within the node."""
        rail = self._rail
        target = Target.staging(rail._heap, rows, routes, rail_rows, copied=False)
        self.rails.cross(
            rows, routes, tables, num_experts, target.offset, rail_rows, exact, num_sms
        )
        handle = NormalHandle(
            tables.prefix,
            tables.position,
            tables.position,
            rows.num_tokens,
            rail_rows,
            rail_rows,
            0,
            num_experts,
            exact,
            rail._identity,
        )
        return target.received(rows, routes, handle, [], None)

    def _tables(
        self, arrived: NormalReceived, counted: _Counted, rail: RailTables, node_experts: int
    ) -> NodeRouting:
        """Where rail rows go within the node, and how what came of them is found again."""
        shape, device = self._shape, self._whole.device
        per_node, rail_rows = shape.ranks_per_node, counted.rail_rows

        def ints(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        assert arrived.topk_idx is not None
        goes = self._node._layout(arrived.topk_idx, node_experts).is_token_in_rank
        nodes = NodeRouting(
            node=shape.node,
            local=shape.local,
            rail=rail,
            rail_rows=rail_rows,
            rail_inbox_rows=(shape.num_nodes - 1) * self._whole.config.max_tokens,
            node_prefix=ints(per_node, per_node),
            node_position=ints(rail_rows, per_node),
            node_inbox_rows=(per_node - 1) * shape.num_nodes * self._whole.config.max_tokens,
            reach=ints(per_node, per_node),
            target=ints(rail_rows, per_node),
            order=ints(counted.rows),
        )
        addresses = (
            shape.num_nodes,
            per_node,
            shape.rank,
            counted.whole.rank_prefix.data_ptr(),
            rail.prefix.data_ptr(),
            goes.data_ptr(),
            rail_rows,
            counted.rows,
            nodes.node_prefix.data_ptr(),
            nodes.node_position.data_ptr(),
            nodes.reach.data_ptr(),
            nodes.target.data_ptr(),
            nodes.order.data_ptr(),
        )
        if device.type == "cpu":
            _C.host_node_tables(*addresses)
        else:
            stream = current.stream_handle(device)
            _C.cuda_node_tables(*addresses, device.index, stream)
        return nodes

    def _spread(
        self,
        arrived: NormalReceived,
        routes: Routes,
        handle: NormalHandle,
        per_expert: list[int],
        counts: torch.Tensor | None,
        num_sms: int,
    ) -> NormalReceived:
        """Send rail rows on to the node's ranks, to where the whole group's order has them."""
        node, nodes = self._node, _nodes_of(handle)
        onward = _onward(arrived)
        target = node._target(onward, routes, handle.num_rows)
        node._launch(
            onward,
            routes,
            handle.num_experts // self._shape.num_nodes,
            Tables(nodes.reach, nodes.target),
            target,
            block_size(handle.exact),
            num_sms,
            arrived.source_token,
        )
        return target.received(onward, routes, handle, per_expert, counts)


def _nodes_of(handle: NormalHandle) -> NodeRouting:
    assert handle.nodes is not None, "a handle of this buffer has a way through its nodes"
    return handle.nodes


def _onward(arrived: NormalReceived) -> Outgoing:
    """Received rows as a dispatch takes them: contiguous, and so are their scales."""
    x, scales = arrived.x, arrived.scales
    row_bytes = x.shape[1] * x.element_size()
    if scales is None:
        return Outgoing(x, row_bytes, row_bytes, None, 0, 0, 0)
    groups = 1 if scales.dim() == 1 else scales.shape[1]
    return Outgoing(x, row_bytes, row_bytes, scales, groups, groups, scales.dim() - 1)
