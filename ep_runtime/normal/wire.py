"""Rails by puts: through shared memory on CPU ranks, by kernels over mapped memory or by NVSHMEM's
device code on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import Unpack

from ep_runtime import current
from ep_runtime.errors import ShapeError
from ep_runtime.memory.nvshmem import NvshmemModule
from ep_runtime.native import _C
from ep_runtime.normal.config import block_bytes
from ep_runtime.normal.handles import Layout, RailTables
from ep_runtime.normal.ops import Routes, Tables, block_size
from ep_runtime.normal.rails import REBUILD, HomeRows, WiredRail
from ep_runtime.normal.steps import NormalSteps
from ep_runtime.normal.validate import Outgoing


@dataclass(frozen=True, slots=True)
class RegionShape:
    """What a rank's region is sized by, and which rank's it is; the same on all but for `rank`."""

    num_nodes: int
    ranks_per_node: int
    rank: int
    max_experts: int
    max_tokens: int
    max_hidden: int
    max_topk: int

    @property
    def native(self) -> tuple[int, int, int, int, int, int, int]:
        """The leading arguments of native calls."""
        return (
            self.num_nodes,
            self.ranks_per_node,
            self.rank,
            self.max_experts,
            self.max_tokens,
            self.max_hidden,
            self.max_topk,
        )

    def offsets(self) -> dict[str, int]:
        """Bytes: the whole region, `data` in it, and the arrays in the data heap."""
        return _C.wire_region(
            self.num_nodes,
            self.ranks_per_node,
            self.max_experts,
            self.max_tokens,
            self.max_hidden,
            self.max_topk,
        )


Transfer = tuple[bool, int, int, int, int, bool, bool, int, int]


class Puts(Protocol):
    """What a rank does on the wire, on the current stream.

    announce  addresses of tokens per rank, per node and per expert, number of experts; or zeros
    put       home, rail prefix, bytes of a row, scales, topk, has_idx, has_weights, rows of every
              rail block (0: as many as arrive), SMs
    """

    def announce(self, per_rank: int, per_node: int, per_expert: int, num_experts: int) -> None: ...
    def await_messages(self, num_experts: int) -> None: ...
    def tables(self, prefix: int, tokens: int, out: int, home: int, order: int) -> None: ...
    def put(self, *transfer: Unpack[Transfer]) -> None: ...
    def await_rows(self, home: bool) -> None: ...
    def reset(self) -> None: ...


class CudaPuts:
    """Kernels on the device's current stream; puts over mapped memory."""

    def __init__(self, native: _C.CudaWire, device: torch.device) -> None:
        self._native = native
        self._device = device

    @property
    def _stream(self) -> int:
        return current.stream_handle(self._device)

    def announce(self, per_rank: int, per_node: int, per_expert: int, num_experts: int) -> None:
        self._native.announce(per_rank, per_node, per_expert, num_experts, self._stream)

    def await_messages(self, num_experts: int) -> None:
        self._native.await_messages(num_experts, self._stream)

    def tables(self, prefix: int, tokens: int, out: int, home: int, order: int) -> None:
        self._native.tables(prefix, tokens, out, home, order, self._stream)

    def put(self, *transfer: Unpack[Transfer]) -> None:
        self._native.put(*transfer, self._stream)

    def await_rows(self, home: bool) -> None:
        self._native.await_rows(home, self._stream)

    def reset(self) -> None:
        self._native.reset()


class NvshmemPuts(CudaPuts):
    """The same waits; puts by NVSHMEM."""

    def __init__(
        self,
        native: _C.CudaWire,
        device: torch.device,
        module: NvshmemModule,
        shape: RegionShape,
    ) -> None:
        super().__init__(native, device)
        self._module = module
        self._own = (*shape.native, native.mine, native.counters, native.abort_word)

    def announce(self, per_rank: int, per_node: int, per_expert: int, num_experts: int) -> None:
        with torch.cuda.device(self._device):
            self._module.announce(
                *self._own, per_rank, per_node, per_expert, num_experts, self._stream
            )

    def put(self, *transfer: Unpack[Transfer]) -> None:
        with torch.cuda.device(self._device):
            self._module.put(*self._own, *transfer, self._stream)


class WiredRails:
    """See Rails. part: the rail, on a loopback; its heap is the data of this rank's region."""

    def __init__(self, whole: NormalSteps, part: WiredRail, shape: RegionShape, puts: Puts) -> None:
        self._part = part
        self._whole = whole
        self._shape = shape
        self._puts = puts
        self._offsets = shape.offsets()

    @property
    def part(self) -> WiredRail:
        return self._part

    def check_out(self, row_bytes: int, num_scales: int, topk: int) -> None:
        shape, at = self._shape, self._offsets
        mirror = (at["partial"] - at["mirrors"]) // shape.num_nodes
        for rows, have in (
            (shape.num_nodes * shape.max_tokens, at["inbox"]),
            (shape.max_tokens, mirror),
        ):
            need = block_bytes(rows, row_bytes, num_scales, topk)
            if need > have:
                raise ShapeError(
                    f"rows of {row_bytes} bytes with {num_scales} scales and top-k {topk}: {rows}"
                    f" of them take {need} bytes, the region that peers put into has {have} for"
                    f" them and cannot grow; {REBUILD}"
                )

    def check_home(self, hidden: int, topk: int) -> None:
        shape = self._shape
        if hidden > shape.max_hidden or topk > shape.max_topk:
            raise ShapeError(
                f"{hidden} channels and top-k {topk} to bring home: the region that peers put into"
                f" is for max_hidden={shape.max_hidden} and max_topk={shape.max_topk} and cannot"
                f" grow; {REBUILD}"
            )

    def meet(self) -> None:
        self._puts.announce(0, 0, 0, 0)
        self._puts.await_messages(0)
        self._whole._after()

    def reset(self) -> None:
        self._puts.reset()

    def announce(self, layout: Layout, by_node: Layout) -> None:
        num_experts = layout.tokens_per_expert.shape[0]
        self._puts.announce(
            layout.tokens_per_rank.data_ptr(),
            by_node.tokens_per_rank.data_ptr(),
            layout.tokens_per_expert.data_ptr(),
            num_experts,
        )
        self._puts.await_messages(num_experts)
        self._whole._after()

    def tables(self, found: Tables) -> RailTables:
        prefix, position = found.rank_prefix, found.send_position
        tokens = position.shape[0]
        order = torch.empty(tokens, dtype=torch.int32, device=prefix.device)
        made = RailTables(
            prefix, position, torch.empty_like(prefix), torch.empty_like(prefix), order
        )
        assert made.out_prefix is not None
        assert made.home_prefix is not None
        self._puts.tables(
            prefix.data_ptr(),
            tokens,
            made.out_prefix.data_ptr(),
            made.home_prefix.data_ptr(),
            order.data_ptr(),
        )
        self.part._after()
        return made

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
        assert offset == 0, "peers put rows to the start of the data heap"
        assert tables.out_prefix is not None
        along = Tables(tables.out_prefix, tables.position)
        size = block_size(exact)
        self.part._ops.dispatch(rows, routes, num_experts, along, offset, rail_rows, size, num_sms)
        self.part._after()
        self._puts.put(
            False,
            tables.prefix.data_ptr(),
            rows.row_bytes,
            rows.num_scales,
            routes.topk,
            routes.topk_idx is not None,
            routes.topk_weights is not None,
            0 if exact else rail_rows,
            num_sms,
        )
        self._puts.await_rows(False)
        self.part._after()

    def partial(self, rail_rows: int, hidden: int, topk: int | None) -> HomeRows:
        heap, size = self.part._heap, 2 * rail_rows * hidden
        rows = heap.view(self._offsets["partial"], size, None).view(torch.bfloat16)
        if topk is None:
            return HomeRows(rows.view(rail_rows, hidden), None, 0)
        weights = heap.view(self._offsets["partial_weights"], 4 * rail_rows * topk, None)
        return HomeRows(
            rows.view(rail_rows, hidden), weights.view(torch.float32).view(rail_rows, topk), topk
        )

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
        assert tables.home_prefix is not None
        row_bytes = 2 * home.rows.shape[1]
        self._puts.put(
            True,
            tables.prefix.data_ptr(),
            row_bytes,
            0,
            home.topk,
            False,
            home.weights is not None,
            0,
            num_sms,
        )
        self._puts.await_rows(True)
        self.part._after()
        self.part._ops.combine(
            home.rows,
            row_bytes,
            home.weights,
            home.topk,
            biases,
            Tables(tables.home_prefix, tables.position),
            num_tokens,
            self.part._heap.sizes.inbox_offset,
            out,
            weights,
            num_sms,
            tables.home_order,
        )
        self.part._after()
