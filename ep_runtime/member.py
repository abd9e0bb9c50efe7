"""What any rank of a group is, whatever its operations: faults, time budget, life."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, NoReturn, Protocol, TypeVar

import torch

from ep_runtime import env
from ep_runtime.errors import EpError, SequenceError, ShapeError
from ep_runtime.faults import fatal_error, routing_error
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.world import MAX_LIMIT_S, World, is_time

LEAST_BUDGET_S = 1e-6
CLOSE_TIMEOUT_S = 10.0  # how long close() waits for peers before it keeps what they may write to

M = TypeVar("M", bound="Member")


class _Native(Protocol):
    def set_time_budget(self, nanoseconds: int) -> None: ...


class _Operations(Protocol):
    @property
    def native(self) -> _Native: ...


class Closed:
    """Stands in for the native operations once their memory is gone."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        raise SequenceError(f"{name} on a closed {self._what}: its memory is gone; build a new one")


class Member(ABC):
    """Base of the ranks: a subclass sets these attributes, calls _join() and knows how to close."""

    config: object
    memory_kind: str
    _ops: _Operations

    def _join(self, world: World, device: torch.device, fault: int) -> None:
        self.world = world
        self._farewell = world.apart()  # who fails may leave it out
        self.rank = world.rank
        self.num_ranks = world.num_ranks
        self.device = device
        self._on_host = device.type == "cpu"
        self._fault = fault
        self._identity = object()
        self._closed = False
        self._routing_told = 0
        self._warming_up = True  # until somebody sets a time budget
        self._budgets_set = 0

    @abstractmethod
    def _close(self, with_peers: bool) -> None:
        """Give the memory back; with_peers: after all ranks have come here."""

    @property
    def backend(self) -> Literal["host", "cuda"]:
        """Where this rank works."""
        return "host" if self._on_host else "cuda"

    # ---- faults and budget ----------------------------------------------------------------------

    def check(self) -> None:
        """Raise what the device recorded; reads host memory, never synchronises.

        PeerTimeout and DesyncError stay until reset(). RoutingFault is raised once.
        """
        self._check_fatal()
        routing = _C.read_routing_fault(self._fault)
        if routing is not None and routing.count != self._routing_told:
            # Counted, not cleared: a fatal fault recorded meanwhile must not be lost.
            dropped, self._routing_told = routing.count - self._routing_told, routing.count
            raise routing_error(routing, dropped)

    def _require_open(self) -> None:
        if self._closed:
            raise SequenceError(
                f"call on a closed {type(self).__name__}: its memory is gone; build a new one"
            )

    def _check_fatal(self) -> None:
        self._require_open()
        fault = _C.read_fault(self._fault)
        if fault is not None:
            raise fatal_error(fault, self._budget_s)

    @property
    def time_budget_s(self) -> float:
        """Seconds that an operation waits for a peer."""
        return self._budget_s

    def set_time_budget(self, seconds: float) -> None:
        """Bound every wait from now on, replays included. Synchronises; not for captured code."""
        if not is_time(seconds, LEAST_BUDGET_S, MAX_LIMIT_S):
            raise ShapeError(
                f"time budget {seconds!r} s: it must be a number from {LEAST_BUDGET_S:g} to"
                f" {MAX_LIMIT_S:g}; 10 is usual in steady state, 60 in warm-up"
            )
        self._apply_budget(seconds)
        self._warming_up = False
        self._budgets_set += 1

    def _apply_budget(self, seconds: float) -> None:
        self._ops.native.set_time_budget(int(seconds * 1e9))
        self._budget_s = seconds

    def steady(self) -> None:
        """Kernels are loaded everywhere: go from the warm-up budget to the steady one."""
        self.set_time_budget(env.read().timeout_s)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Wait for peers that load kernels at least as long as in warm-up.

        Afterwards as long as `set_time_budget` said, or steadily where nobody has called it.
        """
        before, warming_up, number = self._budget_s, self._warming_up, self._budgets_set
        self._apply_budget(max(before, env.read().warmup_timeout_s))
        try:
            yield
        finally:
            if self._budgets_set != number:
                pass  # somebody has set one meanwhile: it stays
            elif warming_up:
                self.steady()
            else:
                self._apply_budget(before)

    # ---- life -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the memory back; again: nothing. Waits a bounded time for the peers to close too.

        Finishes what was launched first. Received tensors stay valid. Raises what the device
        reports where it cannot finish: then this rank is closed all the same, and its memory kept
        until the process ends.
        """
        self._close(with_peers=True)

    def _meet(self) -> bool:
        try:
            self._farewell.barrier(timeout_s=CLOSE_TIMEOUT_S)
        except EpError as error:
            log.warning("closing without the peers: %s", error)
            return False
        return True

    def __enter__(self: M) -> M:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the peers may be elsewhere: do not wait for them.
        self._close(with_peers=kind is None)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rank {self.rank} of {self.num_ranks}, {self.device},"
            f" {self.memory_kind}, {self.config})"
        )
