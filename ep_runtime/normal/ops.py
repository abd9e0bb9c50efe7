"""Tensors in, addresses out: the native calls of the normal operations, alike on host and CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime import current
from ep_runtime.native import _C
from ep_runtime.normal.handles import Layout
from ep_runtime.normal.heap import DataHeap
from ep_runtime.normal.validate import Outgoing


@dataclass(frozen=True, slots=True)
class Routes:
    """topk_idx, weights (or None) and K of a dispatch; no topk_idx: K is 0 unless weights go."""

    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    topk: int


@dataclass(frozen=True, slots=True)
class Tables:
    """Where rows go and come from: see NormalHandle."""

    rank_prefix: torch.Tensor
    send_position: torch.Tensor


def make_native(
    num_ranks: int,
    rank: int,
    max_experts: int,
    control: list[int],
    heap: DataHeap,
    local: int,
    fault: int,
    device: torch.device,
    part: _C.NormalPart,
) -> _C.HostNormal | _C.CudaNormal:
    """The native operations over one generation of the data heap."""
    if device.type == "cpu":
        return _C.HostNormal(
            num_ranks,
            rank,
            max_experts,
            control,
            heap.addresses,
            heap.sizes.total,
            local,
            fault,
            part,
        )
    return _C.CudaNormal(
        num_ranks,
        rank,
        max_experts,
        control,
        heap.addresses,
        heap.sizes.total,
        local,
        fault,
        device.index,
        part,
    )


def block_size(exact: bool) -> int:
    """How a block that the host chose by the number of rows, or by the most there may be, is."""
    return _C.BLOCK_EXACT if exact else _C.BLOCK_PADDED


class NormalOps:
    """One rank's native calls. On CUDA they launch on the device's current stream and return."""

    def __init__(self, native: _C.HostNormal | _C.CudaNormal, device: torch.device) -> None:
        self.native = native
        self._device = device
        self._on_host = device.type == "cpu"

    def _stream(self) -> tuple[int, ...]:
        """The trailing argument of CUDA calls."""
        return () if self._on_host else (current.stream_handle(self._device),)

    def layout(self, topk_idx: torch.Tensor, num_experts: int, into: Layout) -> None:
        self.native.layout(
            topk_idx.data_ptr(),
            topk_idx.element_size(),
            topk_idx.shape[0],
            topk_idx.shape[1],
            num_experts,
            into.tokens_per_rank.data_ptr(),
            into.tokens_per_expert.data_ptr(),
            into.is_token_in_rank.data_ptr(),
            *self._stream(),
        )

    def notify(
        self,
        layout: Layout,
        num_tokens: int,
        num_experts: int,
        alignment: int,
        tables: Tables,
        recv_counts: torch.Tensor,
        host_counts: int,
    ) -> None:
        self.native.notify(
            layout.tokens_per_rank.data_ptr(),
            layout.tokens_per_expert.data_ptr(),
            layout.is_token_in_rank.data_ptr(),
            num_tokens,
            num_experts,
            alignment,
            tables.rank_prefix.data_ptr(),
            tables.send_position.data_ptr(),
            recv_counts.data_ptr(),
            host_counts,
            *self._stream(),
        )

    def dispatch(
        self,
        rows: Outgoing,
        routes: Routes,
        num_experts: int,
        tables: Tables,
        block_offset: int,
        block_rows: int,
        size: int,
        num_sms: int,
        source_token: torch.Tensor | None = None,
    ) -> None:
        """size: a BLOCK_ constant of _C."""
        self.native.dispatch(
            rows.x.data_ptr(),
            rows.stride_bytes,
            rows.row_bytes,
            _address(rows.scales),
            rows.scale_stride_token,
            rows.scale_stride_group,
            rows.num_scales,
            _address(routes.topk_idx),
            8 if routes.topk_idx is None else routes.topk_idx.element_size(),
            _address(routes.topk_weights),
            routes.topk,
            num_experts,
            tables.send_position.data_ptr(),
            tables.rank_prefix.data_ptr(),
            rows.num_tokens,
            block_offset,
            block_rows,
            size,
            num_sms,
            _address(source_token),
            *self._stream(),
        )

    def combine(
        self,
        x: torch.Tensor,
        stride_bytes: int,
        topk_weights: torch.Tensor | None,
        topk: int,
        bias: list[torch.Tensor],
        tables: Tables,
        num_tokens: int,
        inbox_offset: int,
        out: torch.Tensor,
        out_weights: torch.Tensor | None,
        num_sms: int,
        order: torch.Tensor | None = None,
    ) -> None:
        first, second = (*bias, None, None)[:2]
        self.native.combine(
            x.data_ptr(),
            stride_bytes,
            x.shape[1],
            _address(topk_weights),
            topk,
            _address(first),
            _address(second),
            tables.send_position.data_ptr(),
            tables.rank_prefix.data_ptr(),
            num_tokens,
            inbox_offset,
            out.data_ptr(),
            _address(out_weights),
            num_sms,
            _address(order),
            *self._stream(),
        )

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        if not self._on_host:
            torch.cuda.synchronize(self._device)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
