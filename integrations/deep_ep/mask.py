"""Ranks that the others do without (DeepEP's enable_shrink)."""

from __future__ import annotations

import torch

from ep_runtime.errors import BuildError, ConfigError, ShapeError


class RankMask:
    """Which ranks are masked: 1 masked, 0 active. One per Buffer, kept on the host."""

    def __init__(self, num_ranks: int, enabled: bool) -> None:
        self._masked = [0] * num_ranks
        self._enabled = enabled

    @property
    def masked(self) -> list[int]:
        """Ranks that are masked, in order."""
        return [rank for rank, masked in enumerate(self._masked) if masked]

    def update(self, rank: int, mask: bool) -> None:
        """Mask or unmask `rank`."""
        self._check_enabled("low_latency_update_mask_buffer")
        if type(rank) is not int or not 0 <= rank < len(self._masked):
            raise ShapeError(
                f"rank_to_mask={rank!r}: it must be a rank, 0 to {len(self._masked) - 1}"
            )
        self._masked[rank] = int(mask)

    def query(self, status: torch.Tensor) -> None:
        """Write the mask into `status`, int32 [R], contiguous."""
        self._check_enabled("low_latency_query_mask_buffer")
        size = len(self._masked)
        if status.dtype is not torch.int32 or status.shape != (size,):
            raise ShapeError(
                f"mask_status is {list(status.shape)} {status.dtype}: it must be [{size}]"
                " torch.int32"
            )
        status.copy_(torch.tensor(self._masked, dtype=torch.int32))

    def clean(self) -> None:
        """Unmask all ranks."""
        self._check_enabled("low_latency_clean_mask_buffer")
        self._masked = [0] * len(self._masked)

    def refuse_masked(self) -> None:
        """Raise BuildError if a rank is masked: operations cannot leave ranks out yet."""
        if self.masked:
            raise BuildError(
                f"ranks {self.masked} are masked: this version of ep_runtime cannot leave ranks out"
                " of low-latency operations; call low_latency_clean_mask_buffer(), or build the"
                " group without them"
            )

    def _check_enabled(self, call: str) -> None:
        if not self._enabled:
            raise ConfigError(f"{call}() with enable_shrink=False: build the Buffer with it True")
