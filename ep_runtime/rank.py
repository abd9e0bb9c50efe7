"""What a rank is besides its operations: memory, faults, time budget, statistics, life."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NoReturn, TypeVar, cast

import torch

from ep_runtime import env
from ep_runtime.config import DispatchFormat, EpConfig, ScaleFormat
from ep_runtime.errors import ConfigError, EpError, SequenceError, ShapeError
from ep_runtime.faults import fatal_error, routing_error
from ep_runtime.handles import Received, StepStats
from ep_runtime.layout import layout_of, shape_of
from ep_runtime.memory import RankMemory
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.ops import Ops, make_ops
from ep_runtime.order import OpName, SendOrder
from ep_runtime.pending import Pending
from ep_runtime.receive import ReceiveBuffer, allocate_receive
from ep_runtime.validate import Checker
from ep_runtime.world import World

MAX_BUDGET_S = 86400.0
CLOSE_TIMEOUT_S = 10.0  # how long close() waits for peers before it keeps what they may write to

R = TypeVar("R", bound="Rank")
OpKind = Literal[
    "dispatch_send",
    "dispatch_recv",
    "dispatch_fused",
    "combine_send",
    "combine_recv",
    "combine_fused",
]


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One launch of one operation, as a recorder is told of it."""

    chain: int
    kind: OpKind


class _Closed:
    """Stands in for the native rank once its memory is gone."""

    def __getattr__(self, name: str) -> NoReturn:
        raise SequenceError(f"{name} on a closed Buffer: its memory is gone; build a new one")


def _refuse_closed(_address: int) -> NoReturn:
    raise SequenceError("call on a closed Buffer: its memory is gone; build a new one")


class Rank:
    """Base of Buffer: everything about one rank that no token goes through."""

    def _assemble(
        self,
        config: EpConfig,
        world: World,
        device: torch.device,
        memory: RankMemory,
        order: SendOrder | None,
    ) -> None:
        self.config = config
        self.world = world
        self.rank = world.rank
        self.num_ranks = world.num_ranks
        self.device = device
        self.memory_kind = memory.kind
        self._memory = memory
        self._order = order
        self._closed = False
        self._on_host = device.type == "cpu"
        self._fault = memory.fault
        self._identity = object()
        self._ops: Ops = make_ops(config, self.rank, memory, device)
        self._checker = Checker(config, self.num_ranks, device, self._identity)
        self._shape = shape_of(config, self.num_ranks)
        self._inboxes = [self._receive(zeroed=True) for _ in range(config.num_chains)]
        # Sends that were not waited for.
        self._open: dict[tuple[OpName, int], Pending[Received] | Pending[torch.Tensor]] = {}
        self._routing_told = 0
        # Told of every operation before it is launched; what it raises keeps it from being.
        self.recorder: Callable[[OpRecord], None] | None = None
        self._read_fault: Callable[[int], _C.Fault | None] = _C.read_fault
        self._read_routing: Callable[[int], _C.Fault | None] = _C.read_routing_fault
        self._ops.synchronize()
        self.set_time_budget(env.read().warmup_timeout_s)

    @property
    def backend(self) -> Literal["host", "cuda"]:
        """Where this rank works."""
        return "host" if self._on_host else "cuda"

    @property
    def local_experts(self) -> range:
        """The experts this rank owns."""
        count = self.config.local_experts(self.num_ranks)
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def virtual(self) -> bool:
        """True for one of several ranks of this process."""
        return self._order is not None

    def new_receive(
        self,
        *,
        dispatch_format: DispatchFormat | None = None,
        scale_format: ScaleFormat | None = None,
        column_major_scales: bool = False,
    ) -> ReceiveBuffer:
        """Receive tensors for `dispatch(out=...)`: for formats other than the configuration's, for
        handles that outlive the chain's next dispatch, for rows that several dispatches keep.

        dispatch_format      None: the configuration's; one with "bf16" also takes "fp8"
        scale_format         None: the configuration's
        column_major_scales  scales lie with stride 1 over rows, as DeepGEMM's grouped GEMMs and
                             DeepEP's callers expect
        Allocates; not for captured code, unless torch's capture pool may own the tensors.
        Raises ConfigError for a format that this Buffer's heap has no room for.
        """
        return self._receive(dispatch_format, scale_format, column_major_scales=column_major_scales)

    def _receive(
        self,
        dispatch_format: DispatchFormat | None = None,
        scale_format: ScaleFormat | None = None,
        *,
        column_major_scales: bool = False,
        zeroed: bool = False,
    ) -> ReceiveBuffer:
        config = self.config
        wanted = config.dispatch_format if dispatch_format is None else dispatch_format
        if wanted != config.dispatch_format and (config.dispatch_format, wanted) != ("bf16", "fp8"):
            raise ConfigError(
                f"dispatch_format={wanted!r} on a Buffer made for {config.dispatch_format!r}: only"
                " one made for 'bf16' has room for another ('fp8'); build the EpConfig with the"
                " format you need"
            )
        return allocate_receive(
            config,
            self.num_ranks,
            self.device,
            self._identity,
            wanted,
            config.scale_format if scale_format is None else scale_format,
            column_major_scales,
            zeroed,
        )

    # ---- faults, budget, statistics -------------------------------------------------------------

    def check(self) -> None:
        """Raise what the device recorded; reads host memory, never synchronises.

        PeerTimeout, DesyncError or SequenceError stay until reset(). RoutingFault is raised once.
        """
        self._check_fatal()
        routing = self._read_routing(self._fault)
        if routing is not None and routing.count != self._routing_told:
            # Counted, not cleared: a fatal fault recorded meanwhile must not be lost.
            dropped, self._routing_told = routing.count - self._routing_told, routing.count
            raise routing_error(routing, dropped)

    def _check_fatal(self) -> None:
        fault = self._read_fault(self._fault)
        if fault is not None:
            raise fatal_error(fault, self._budget_s)

    @property
    def time_budget_s(self) -> float:
        """Seconds that an operation waits for a peer."""
        return self._budget_s

    def set_time_budget(self, seconds: float) -> None:
        """Bound every wait from now on, replays included. Synchronises; not for captured code."""
        if not 0 < seconds <= MAX_BUDGET_S:
            raise ShapeError(
                f"time budget {seconds!r} s: it must be above 0 and at most {MAX_BUDGET_S:g}; 10 is"
                " usual in steady state, 60 in warm-up"
            )
        self._ops.native.set_time_budget(int(seconds * 1e9))
        self._budget_s = seconds

    def steady(self) -> None:
        """Kernels are loaded everywhere: go from the warm-up budget to the steady one."""
        self.set_time_budget(env.read().timeout_s)

    def stats(self, chain: int = 0) -> StepStats:
        """What `chain` moved since its statistics were last zeroed. Synchronises."""
        values = self._ops.native.read_stats(chain)
        sums = {name: value for name, value in values.items() if isinstance(value, int)}
        return StepStats(**sums, wait_ns=tuple(values["wait_ns"][: self.num_ranks]))

    def stats_region(self, chain: int) -> tuple[int, int]:
        """(address, bytes) of the chain's statistics: local memory, which a reset node zeroes."""
        layout = layout_of(self.config, self.num_ranks)
        offset = layout.stats_offset + chain * layout.stats_stride
        return self._memory.local + offset, layout.stats_bytes

    def epochs(self, chain: int = 0) -> tuple[int, int]:
        """(dispatched, combined) of the chain's device words. Synchronises; for diagnosis."""
        return self._ops.native.read_state(chain)

    # ---- life -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything in flight and every fault. Collective, synchronises.

        Ranks of processes meet before and after; virtual ranks are reset one by one, all of them
        before the next operation. Raises PeerTimeout if a rank does not come.
        """
        self._ops.synchronize()
        self.world.barrier()
        self._ops.native.reset()
        _C.clear_faults(self._fault)
        self._routing_told = 0
        self._open.clear()
        if self._order is not None:
            self._order.forget(self.rank)
        self.set_time_budget(self._budget_s)
        self.world.barrier()

    def close(self) -> None:
        """Give the memory back; again: nothing. Waits a bounded time for the peers to close too.

        Finishes what was launched first. Tensors of Received stay valid.
        """
        self._close(with_peers=True)

    def _close(self, with_peers: bool) -> None:
        if self._closed:
            return
        failed = self._read_fault(self._fault) is not None
        self._closed = True
        if with_peers or failed:  # else kernels may wait for peers that never come
            self._ops.synchronize()
            self._memory.close((lambda: False) if failed and not self.virtual else self._meet)
        else:
            self._memory.abandon()
        self._ops = cast(Ops, _Closed())
        self._read_fault = self._read_routing = _refuse_closed

    def _meet(self) -> bool:
        try:
            self.world.barrier(timeout_s=CLOSE_TIMEOUT_S)
        except EpError as error:
            log.warning("closing without the peers: %s", error)
            return False
        return True

    def __enter__(self: R) -> R:
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
