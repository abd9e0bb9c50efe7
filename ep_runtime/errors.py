"""Exceptions, named by what the caller does next.

Every message carries the value, the limit and the remedy.
"""

from __future__ import annotations


class EpError(Exception):
    """Base class of every error that this package raises on purpose."""


class ShapeError(EpError, ValueError):
    """Fix the call: a dtype, shape, stride, device or size is not what the operation takes."""


class ConfigError(EpError, ValueError):
    """Fix the configuration: a value is out of range, or ranks were given different ones."""


class SequenceError(EpError, RuntimeError):
    """Fix the order of calls: what was sent is received before the next send of its kind."""


class BuildError(EpError, RuntimeError):
    """Install or rebuild: this build or machine lacks what the call needs."""


class CheckpointError(EpError, ValueError):
    """Give another checkpoint: this one does not fit the model or is damaged."""


class CaptureError(EpError, RuntimeError):
    """Capture again: the graph is not what it must be, or was never captured."""


class RoutingFault(EpError, RuntimeError):
    """Fix the router: topk_idx held expert numbers out of range (or twice); they were not sent."""


class GroupFault(EpError, RuntimeError):
    """Tear the group down, or call reset() on every rank."""


class PeerTimeout(GroupFault):
    """A peer did not arrive within the time budget.

    `peer` is the rank that was waited for, `rank` the one that noticed first.
    """

    def __init__(self, message: str, *, rank: int, peer: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes: keyword arguments are not what BaseException keeps."""
        return _make_peer_timeout, (str(self), self.rank, self.peer)


def _make_peer_timeout(message: str, rank: int, peer: int) -> PeerTimeout:
    return PeerTimeout(message, rank=rank, peer=peer)


class DesyncError(GroupFault):
    """Ranks issued different sequences of operations on a chain."""


class CudaError(EpError, RuntimeError):
    """A CUDA call failed; the message names the call and CUDA's own reason."""
