"""Going on without some ranks."""

from __future__ import annotations

import torch

from ep_runtime.errors import ShapeError
from ep_runtime.ops import Ops
from ep_runtime.order import SendOrder


class Masks:
    """Base of Rank: the ranks that this one does without.

    The mask lies on the device, and every operation reads it when it begins, replays of graphs
    included. Operations neither send to nor wait for a masked rank: choices of its experts are not
    sent, it sends no rows, and what it would have brought back is left out of combines. A rank
    that is masked itself does without everybody: its operations move nothing and end at once.

    Every rank that is not masked must have the same mask in the same operation: where one differs,
    DesyncError names it. A timeout does not mask: see docs/masks.md for what the others do when a
    rank is gone, and before one comes back.
    """

    rank: int
    num_ranks: int
    device: torch.device
    _ops: Ops
    _order: SendOrder | None

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Mask `rank`, or no longer, for operations behind this call in stream order.

        On a GPU it only launches; capturable. On the host it takes effect at once. Raises
        ShapeError if there is no such rank.
        """
        if type(rank) is not int or not 0 <= rank < self.num_ranks:
            raise ShapeError(f"rank={rank!r}: it must be a rank, 0 to {self.num_ranks - 1}")
        if type(masked) is not bool:
            raise ShapeError(f"masked={masked!r}: it must be True or False")
        self._ops.set_rank_mask(rank, masked)
        if self._order is not None:
            self._order.set_masked(self.rank, rank, masked)

    def clear_rank_mask(self) -> None:
        """Mask nobody any more. As set_rank_mask()."""
        self._ops.clear_rank_mask()
        if self._order is not None:
            for rank in range(self.num_ranks):
                self._order.set_masked(self.rank, rank, False)

    def rank_mask(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """int32 [R] on the device: 1 for each masked rank, else 0. In stream order; capturable.

        out  int32 [R], contiguous, to be written; allocated if None. Raises ShapeError.
        """
        if out is None:
            out = torch.empty(self.num_ranks, dtype=torch.int32, device=self.device)
        if not isinstance(out, torch.Tensor):
            raise ShapeError(f"out is a {type(out).__name__}: pass an int32 tensor")
        wanted = (self.num_ranks,)
        if out.dtype is not torch.int32 or out.shape != wanted or not out.is_contiguous():
            raise ShapeError(
                f"out is {list(out.shape)} {out.dtype}: it must be [{self.num_ranks}] torch.int32,"
                " contiguous"
            )
        if out.device != self.device:
            raise ShapeError(f"out is on {out.device}: it must be on {self.device}")
        self._ops.write_rank_mask(out)
        return out

    def masked_ranks(self) -> list[int]:
        """Ranks that are masked, in order. Synchronises."""
        return self._ops.native.read_rank_mask()
