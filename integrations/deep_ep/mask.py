"""Ranks that the others do without (DeepEP's enable_shrink)."""

from __future__ import annotations

import torch

from ep_runtime.buffer import Buffer as EpBuffer
from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.integrations.deep_ep.config import plain
from ep_runtime.integrations.deep_ep.place import Place
from ep_runtime.normal.validate import require_tensor


class RankMask:
    """Which ranks are masked: 1 masked, 0 active. One for all native buffers of a deep_ep Buffer.

    The masks that count lie on the device, one in every native buffer; what the host was told is
    kept for those that are still to be made.
    """

    def __init__(self, place: Place, enabled: bool) -> None:
        self._place = place
        self._told = [False] * place.world.num_ranks
        self._buffers: list[EpBuffer] = []
        self.enabled = enabled

    def adopt(self, buffer: EpBuffer) -> None:
        """A native buffer has been made: it takes the mask, now and from now on."""
        self._buffers.append(buffer)
        for rank, masked in enumerate(self._told):
            if masked:
                buffer.set_rank_mask(rank, True)

    def forget(self) -> None:
        """The native buffers are about to be closed."""
        self._buffers.clear()

    def update(self, rank: int, mask: bool) -> None:
        """Mask or unmask `rank`, in stream order. Capturable."""
        self._check_enabled("low_latency_update_mask_buffer")
        rank = plain(rank)
        if type(rank) is not int or not 0 <= rank < len(self._told):
            raise ShapeError(
                f"rank_to_mask={rank!r}: it must be a rank, 0 to {len(self._told) - 1}"
            )
        self._set({rank: bool(mask)})

    def query(self, status: torch.Tensor) -> None:
        """Write the mask into `status`, int32 [R], contiguous, in stream order. Capturable."""
        self._check_enabled("low_latency_query_mask_buffer")
        require_tensor("mask_status", status)
        size = len(self._told)
        if status.dtype is not torch.int32 or status.shape != (size,):
            raise ShapeError(
                f"mask_status is {list(status.shape)} {status.dtype}: it must be [{size}]"
                " torch.int32"
            )
        if not self._buffers:
            status.copy_(torch.tensor(self._told, dtype=torch.int32))
            return
        buffer = self._buffers[0]
        with self._place.comm.here():
            if status.device == buffer.device and status.is_contiguous():
                buffer.rank_mask(status)
            else:
                status.copy_(buffer.rank_mask())

    def clean(self) -> None:
        """Unmask all ranks, in stream order. Capturable."""
        self._check_enabled("low_latency_clean_mask_buffer")
        self._set(dict.fromkeys(range(len(self._told)), False))

    def _set(self, masks: dict[int, bool]) -> None:
        if not self._buffers:
            self._note(masks)
            return
        if not self._place.capturing():  # a capture changes nothing yet
            self._note(masks)
        with self._place.comm.here():
            for buffer in self._buffers:
                for rank, masked in masks.items():
                    buffer.set_rank_mask(rank, masked)

    def _note(self, masks: dict[int, bool]) -> None:
        for rank, masked in masks.items():
            self._told[rank] = masked

    def _check_enabled(self, call: str) -> None:
        if not self.enabled:
            raise ConfigError(f"{call}() with enable_shrink=False: build the Buffer with it True")
