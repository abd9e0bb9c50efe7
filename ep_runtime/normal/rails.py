"""How rows get from node to node: over mapped memory, or by puts into regions of the peers.

Both are the rail's own dispatch and combine. Over mapped memory they work as in any group. By puts
they work on this rank's memory alone (csrc/ep/wire.h): a dispatch leaves what goes to another node
in a mirror, which is put to where that node expects it; a combine finds what was put in its inbox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ep_runtime.errors import ShapeError
from ep_runtime.native import _C
from ep_runtime.normal.handles import Layout, RailTables
from ep_runtime.normal.ops import Routes, Tables, block_size
from ep_runtime.normal.steps import NormalSteps
from ep_runtime.normal.validate import Outgoing

REBUILD = "build the NormalBuffer with a larger max_tokens, max_hidden or max_topk"


class NodePart(NormalSteps):
    """A rank's end of its rail or of its node: the steps of a NormalBuffer, driven by one."""


class WiredRail(NodePart):
    """A rail whose memory peers put into: made once, for the sizes of the buffer."""

    def _make_room(self, staging: int, inbox: int) -> None:
        have = self._heap.sizes
        if staging > have.staging or inbox > have.inbox:
            raise ShapeError(
                f"rows that cross nodes need {staging} bytes to arrive and {inbox} to come home,"
                f" the region that peers put into has {have.staging} and {have.inbox} and cannot"
                f" grow; {REBUILD}"
            )


@dataclass(frozen=True, slots=True)
class HomeRows:
    """Sums of a node, to go back to where their tokens came from: bf16 [V, H], float32 [V, K]."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    topk: int


class Rails(Protocol):
    """A rank's way to its rail. Calls launch on the current stream and are capturable."""

    @property
    def part(self) -> NodePart:
        """The rail."""

    def check_out(self, row_bytes: int, num_scales: int, topk: int) -> None:
        """Raise ShapeError if rows as wide cannot cross, however many there are."""

    def check_home(self, hidden: int, topk: int) -> None:
        """The same of sums of a node."""

    def meet(self) -> None:
        """Wait for every rank of the whole group, as announce() does.

        Where one is missing, all others find out here, from itself and not from the rank of their
        rail or node that waits for it in turn: so that all of them name it.
        """

    def reset(self) -> None:
        """Forget what is in flight; every rank does, between two barriers. Synchronises."""

    def announce(self, layout: Layout, by_node: Layout) -> None:
        """Before the notifies of the whole group and of the rail."""

    def tables(self, found: Tables) -> RailTables:
        """What cross() and bring_home() take, out of what the rail's notify made."""

    def cross(
        self,
        rows: Outgoing,
        routes: Routes,
        tables: RailTables,
        num_experts: int,
        offset: int,
        rail_rows: int,
        exact: bool,
        num_sms: int,
    ) -> None:
        """Send each token once to each node; returns with the rail's rows at `offset`."""

    def partial(self, rail_rows: int, hidden: int, topk: int | None) -> HomeRows:
        """Where a node's sums go. topk: of weights, None without."""

    def bring_home(
        self,
        home: HomeRows,
        tables: RailTables,
        biases: list[torch.Tensor],
        num_tokens: int,
        out: torch.Tensor,
        weights: torch.Tensor | None,
        num_sms: int,
    ) -> None:
        """Add up what all nodes made of this rank's tokens."""


class MappedRails:
    """Rails whose ranks map each other's memory."""

    def __init__(self, whole: NormalSteps, part: NodePart) -> None:
        self._part = part
        self._whole = whole
        ranks, device = whole.num_ranks, whole.device
        self._nowhere = Tables(
            torch.zeros((ranks, ranks), dtype=torch.int32, device=device),
            torch.zeros((0, ranks), dtype=torch.int32, device=device),
        )
        nothing = torch.zeros((0, 16), dtype=torch.uint8, device=device)
        self._nothing = Outgoing(nothing, 16, 16, None, 0, 0, 0)

    @property
    def part(self) -> NodePart:
        return self._part

    def check_out(self, row_bytes: int, num_scales: int, topk: int) -> None:
        """Nothing: the rail's heap grows."""

    def check_home(self, hidden: int, topk: int) -> None:
        """Nothing: the rail's heap grows."""

    def meet(self) -> None:
        """A dispatch of nothing to all ranks."""
        whole = self._whole
        whole._ops.dispatch(
            self._nothing,
            Routes(None, None, 0),
            whole.num_ranks,
            self._nowhere,
            0,
            0,
            _C.BLOCK_EXACT,
            1,
        )
        whole._after()

    def reset(self) -> None:
        """Nothing: the whole group and its parts hold all there is."""

    def announce(self, layout: Layout, by_node: Layout) -> None:
        """Nothing: the notifies reach every rank themselves."""

    def tables(self, found: Tables) -> RailTables:
        return RailTables(found.rank_prefix, found.send_position, None, None, None)

    def cross(
        self,
        rows: Outgoing,
        routes: Routes,
        tables: RailTables,
        num_experts: int,
        offset: int,
        rail_rows: int,
        exact: bool,
        num_sms: int,
    ) -> None:
        along = Tables(tables.prefix, tables.position)
        size = block_size(exact)
        self.part._ops.dispatch(rows, routes, num_experts, along, offset, rail_rows, size, num_sms)
        self.part._after()

    def partial(self, rail_rows: int, hidden: int, topk: int | None) -> HomeRows:
        device = self.part.device
        rows = torch.empty((rail_rows, hidden), dtype=torch.bfloat16, device=device)
        if topk is None:
            return HomeRows(rows, None, 0)
        weights = torch.empty((rail_rows, topk), dtype=torch.float32, device=device)
        return HomeRows(rows, weights, topk)

    def bring_home(
        self,
        home: HomeRows,
        tables: RailTables,
        biases: list[torch.Tensor],
        num_tokens: int,
        out: torch.Tensor,
        weights: torch.Tensor | None,
        num_sms: int,
    ) -> None:
        self.part._ops.combine(
            home.rows,
            2 * home.rows.shape[1],
            home.weights,
            home.topk,
            biases,
            Tables(tables.prefix, tables.position),
            num_tokens,
            self.part._heap.sizes.inbox_offset,
            out,
            weights,
            num_sms,
        )
        self.part._after()
