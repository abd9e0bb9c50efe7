"""Tensors in, addresses out: the calls of the native ranks, alike on host and CUDA."""

from __future__ import annotations

from typing import Protocol

import torch

from ep_runtime import env
from ep_runtime.config import EpConfig
from ep_runtime.layout import shape_of
from ep_runtime.memory import RankMemory
from ep_runtime.native import _C


class Ops(Protocol):
    """One rank's operations. Strides in elements; a `num_tokens` tensor bounds the real rows."""

    @property
    def native(self) -> _C.HostRank | _C.CudaRank: ...

    def dispatch_send(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> None: ...

    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None: ...

    def dispatch_fused(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
        target: _C.RecvTarget,
        expected_tokens: int,
    ) -> None: ...

    def combine_send(
        self, chain: int, y: torch.Tensor, y_stride: int, expected_tokens: int
    ) -> None: ...

    def combine_recv(
        self, chain: int, out: torch.Tensor, num_tokens: torch.Tensor | None
    ) -> None: ...

    def combine_fused(
        self,
        chain: int,
        y: torch.Tensor,
        y_stride: int,
        out: torch.Tensor,
        num_tokens: torch.Tensor | None,
        expected_tokens: int,
    ) -> None: ...

    def synchronize(self) -> None: ...


def make_ops(
    config: EpConfig, rank: int, memory: RankMemory, device: torch.device
) -> HostOps | CudaOps:
    """The operations of `rank` on `device`."""
    shape = shape_of(config, len(memory.heaps))
    if device.type == "cpu":
        return HostOps(_C.HostRank(shape, rank, memory.heaps, memory.local, memory.fault))
    settings = env.read()
    native = _C.CudaRank(
        shape,
        rank,
        memory.heaps,
        memory.local,
        memory.fault,
        device.index,
        settings.num_sms,
        settings.pdl,
    )
    return CudaOps(native, device)


class HostOps:
    """A CPU rank: every call returns when its work is done."""

    def __init__(self, native: _C.HostRank) -> None:
        self.native = native

    def dispatch_send(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> None:
        self.native.dispatch_send(
            chain,
            x.data_ptr(),
            x_stride,
            topk_idx.data_ptr(),
            topk_idx.element_size(),
            weights.data_ptr(),
            x.shape[0],
            _address(num_tokens),
        )

    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None:
        del expected_tokens  # sizes a launch; here there is none
        self.native.dispatch_recv(chain, target)

    def dispatch_fused(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
        target: _C.RecvTarget,
        expected_tokens: int,
    ) -> None:
        self.dispatch_send(chain, x, x_stride, topk_idx, weights, num_tokens)
        self.dispatch_recv(chain, target, expected_tokens)

    def combine_send(
        self, chain: int, y: torch.Tensor, y_stride: int, expected_tokens: int
    ) -> None:
        del expected_tokens
        self.native.combine_send(chain, y.data_ptr(), y_stride)

    def combine_recv(self, chain: int, out: torch.Tensor, num_tokens: torch.Tensor | None) -> None:
        self.native.combine_recv(chain, out.data_ptr(), out.shape[0], _address(num_tokens))

    def combine_fused(
        self,
        chain: int,
        y: torch.Tensor,
        y_stride: int,
        out: torch.Tensor,
        num_tokens: torch.Tensor | None,
        expected_tokens: int,
    ) -> None:
        self.combine_send(chain, y, y_stride, expected_tokens)
        self.combine_recv(chain, out, num_tokens)

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaOps:
    """A GPU rank: every call launches on the device's current stream and returns."""

    def __init__(self, native: _C.CudaRank, device: torch.device) -> None:
        self.native = native
        self._device = device

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def dispatch_send(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> None:
        self.native.dispatch_send(
            chain,
            x.data_ptr(),
            x_stride,
            topk_idx.data_ptr(),
            topk_idx.element_size(),
            weights.data_ptr(),
            x.shape[0],
            _address(num_tokens),
            self._stream(),
        )

    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None:
        self.native.dispatch_recv(chain, target, expected_tokens, self._stream())

    def dispatch_fused(
        self,
        chain: int,
        x: torch.Tensor,
        x_stride: int,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor | None,
        target: _C.RecvTarget,
        expected_tokens: int,
    ) -> None:
        self.native.dispatch_fused(
            chain,
            x.data_ptr(),
            x_stride,
            topk_idx.data_ptr(),
            topk_idx.element_size(),
            weights.data_ptr(),
            x.shape[0],
            _address(num_tokens),
            target,
            expected_tokens,
            self._stream(),
        )

    def combine_send(
        self, chain: int, y: torch.Tensor, y_stride: int, expected_tokens: int
    ) -> None:
        self.native.combine_send(chain, y.data_ptr(), y_stride, expected_tokens, self._stream())

    def combine_recv(self, chain: int, out: torch.Tensor, num_tokens: torch.Tensor | None) -> None:
        self.native.combine_recv(
            chain, out.data_ptr(), out.shape[0], _address(num_tokens), self._stream()
        )

    def combine_fused(
        self,
        chain: int,
        y: torch.Tensor,
        y_stride: int,
        out: torch.Tensor,
        num_tokens: torch.Tensor | None,
        expected_tokens: int,
    ) -> None:
        self.native.combine_fused(
            chain,
            y.data_ptr(),
            y_stride,
            out.data_ptr(),
            out.shape[0],
            _address(num_tokens),
            expected_tokens,
            self._stream(),
        )

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        torch.cuda.synchronize(self._device)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
