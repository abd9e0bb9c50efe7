"""The native operations of one rank, on the host or on a GPU: the same calls."""

from __future__ import annotations

from typing import Protocol

import torch

from ep_runtime import current, env
from ep_runtime.config import EpConfig
from ep_runtime.layout import shape_of
from ep_runtime.memory import RankMemory
from ep_runtime.native import _C


class Ops(Protocol):
    """Operations on checked arguments. `expected_tokens` only sizes a launch."""

    @property
    def native(self) -> _C.HostRank | _C.CudaRank: ...
    def dispatch_send(self, chain: int, inputs: _C.SendInput) -> None: ...
    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None: ...
    def dispatch_fused(
        self, chain: int, inputs: _C.SendInput, target: _C.RecvTarget, expected_tokens: int
    ) -> None: ...
    def combine_send(self, chain: int, inputs: _C.CombineInput, expected_tokens: int) -> None: ...
    def combine_recv(self, chain: int, output: _C.CombineOutput) -> None: ...
    def combine_fused(
        self, chain: int, inputs: _C.CombineInput, output: _C.CombineOutput, expected_tokens: int
    ) -> None: ...
    def set_rank_mask(self, rank: int, masked: bool) -> None: ...
    def clear_rank_mask(self) -> None: ...
    def write_rank_mask(self, mask: torch.Tensor) -> None: ...
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

    def dispatch_send(self, chain: int, inputs: _C.SendInput) -> None:
        self.native.dispatch_send(chain, inputs)

    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None:
        del expected_tokens  # sizes a launch; here there is none
        self.native.dispatch_recv(chain, target)

    def dispatch_fused(
        self, chain: int, inputs: _C.SendInput, target: _C.RecvTarget, expected_tokens: int
    ) -> None:
        self.dispatch_send(chain, inputs)
        self.dispatch_recv(chain, target, expected_tokens)

    def combine_send(self, chain: int, inputs: _C.CombineInput, expected_tokens: int) -> None:
        del expected_tokens
        self.native.combine_send(chain, inputs)

    def combine_recv(self, chain: int, output: _C.CombineOutput) -> None:
        self.native.combine_recv(chain, output)

    def combine_fused(
        self, chain: int, inputs: _C.CombineInput, output: _C.CombineOutput, expected_tokens: int
    ) -> None:
        self.combine_send(chain, inputs, expected_tokens)
        self.combine_recv(chain, output)

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        self.native.set_rank_mask(rank, masked)

    def clear_rank_mask(self) -> None:
        self.native.clear_rank_mask()

    def write_rank_mask(self, mask: torch.Tensor) -> None:
        mask.zero_()
        mask[self.native.read_rank_mask()] = 1

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaOps:
    """A GPU rank: every call launches on the device's current stream and returns."""

    def __init__(self, native: _C.CudaRank, device: torch.device) -> None:
        self.native = native
        self._device = device

    def _stream(self) -> int:
        return current.stream_handle(self._device)

    def dispatch_send(self, chain: int, inputs: _C.SendInput) -> None:
        self.native.dispatch_send(chain, inputs, self._stream())

    def dispatch_recv(self, chain: int, target: _C.RecvTarget, expected_tokens: int) -> None:
        self.native.dispatch_recv(chain, target, expected_tokens, self._stream())

    def dispatch_fused(
        self, chain: int, inputs: _C.SendInput, target: _C.RecvTarget, expected_tokens: int
    ) -> None:
        self.native.dispatch_fused(chain, inputs, target, expected_tokens, self._stream())

    def combine_send(self, chain: int, inputs: _C.CombineInput, expected_tokens: int) -> None:
        self.native.combine_send(chain, inputs, expected_tokens, self._stream())

    def combine_recv(self, chain: int, output: _C.CombineOutput) -> None:
        self.native.combine_recv(chain, output, self._stream())

    def combine_fused(
        self, chain: int, inputs: _C.CombineInput, output: _C.CombineOutput, expected_tokens: int
    ) -> None:
        self.native.combine_fused(chain, inputs, output, expected_tokens, self._stream())

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        self.native.set_rank_mask(rank, masked, self._stream())

    def clear_rank_mask(self) -> None:
        self.native.clear_rank_mask(self._stream())

    def write_rank_mask(self, mask: torch.Tensor) -> None:
        self.native.write_rank_mask(mask.data_ptr(), self._stream())

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        torch.cuda.synchronize(self._device)
