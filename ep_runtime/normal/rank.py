"""What a rank of a normal buffer is besides its operations: memory, faults, time budget, life."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, NoReturn, Protocol, TypeVar, cast

import torch

from ep_runtime import env
from ep_runtime.errors import EpError, SequenceError, ShapeError
from ep_runtime.faults import fatal_error, routing_error
from ep_runtime.memory import RankMemory
from ep_runtime.memory.base import log
from ep_runtime.native import _C
from ep_runtime.normal.config import NormalConfig
from ep_runtime.normal.counts import HostCounts
from ep_runtime.normal.handles import NormalStats
from ep_runtime.normal.heap import DataHeap, HeapSizes
from ep_runtime.normal.ops import NormalOps, make_native
from ep_runtime.normal.streams import StreamOrder
from ep_runtime.normal.tuned import DEFAULT_SMS, TunedSms
from ep_runtime.normal.validate import Checker
from ep_runtime.world import World

MAX_BUDGET_S = 86400.0
CLOSE_TIMEOUT_S = 10.0  # how long close() waits for peers before it keeps what they may write to

R = TypeVar("R", bound="NormalRank")


class Provider(Protocol):
    """Gives a rank a new data heap of so many bytes. Collective; raises on every rank."""

    def __call__(self, num_bytes: int) -> RankMemory: ...


class _Closed:
    """Stands in for the native calls once their memory is gone."""

    def __getattr__(self, name: str) -> NoReturn:
        raise SequenceError(f"{name} on a closed NormalBuffer: its memory is gone; build a new one")


class NormalRank:
    """Base of NormalBuffer: everything about one rank that no row goes through."""

    def _assemble(
        self,
        config: NormalConfig,
        world: World,
        device: torch.device,
        control: RankMemory,
        data: RankMemory,
        provider: Provider,
        num_sms: TunedSms,
        max_sms: int,
    ) -> None:
        self.config = config
        self.world = world
        self.rank = world.rank
        self.num_ranks = world.num_ranks
        self.device = device
        self.memory_kind = control.kind
        self.stats = NormalStats()
        self.max_sms = max_sms
        self.num_sms = TunedSms(
            self._sms(num_sms.dispatch, DEFAULT_SMS), self._sms(num_sms.combine, DEFAULT_SMS)
        )
        self._on_host = device.type == "cpu"
        self._provider = provider
        self._control = control
        self._fault = control.fault
        self._identity = object()
        self._closed = False
        self._routing_told = 0
        self._copy_told = False
        self._heap = DataHeap(data, self.rank, config.heap_sizes(self.num_ranks), device)
        self._retired: list[DataHeap] = []
        self._ops = self._make_ops()
        self._streams = StreamOrder(device)
        self._host_counts = HostCounts(self.num_ranks, config.max_experts, device)
        self._check = Checker(
            self.num_ranks, config.max_experts, config.max_topk, device, self._identity
        )
        self._ops.synchronize()
        self.set_time_budget(env.read().warmup_timeout_s)

    def _make_ops(self) -> NormalOps:
        native = make_native(
            self.num_ranks,
            self.rank,
            self.config.max_experts,
            self._control.heaps,
            self._heap,
            self._control.local,
            self._control.fault,
            self.device,
        )
        return NormalOps(native, self.device)

    @property
    def backend(self) -> Literal["host", "cuda"]:
        """Where this rank works."""
        return "host" if self._on_host else "cuda"

    @property
    def heap_sizes(self) -> HeapSizes:
        """The parts of the data heap as they are now."""
        return self._heap.sizes

    @property
    def pool_in_use(self) -> int:
        """Bytes of the pool that received tensors (or captures) hold."""
        return self._heap.pool.in_use

    def _sms(self, wanted: int | None, default: int) -> int:
        """SMs of one call. Ranks that share a GPU have to run at the same time: see max_sms."""
        if wanted is None:
            return default
        if type(wanted) is not int or wanted < 1:
            raise ShapeError(f"num_sms={wanted!r}: it must be an integer from 1 on; 24 is usual")
        return min(wanted, self.max_sms)

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

    def _check_fatal(self) -> None:
        if self._closed:
            raise SequenceError(
                "call on a closed NormalBuffer: its memory is gone; build a new one"
            )
        fault = _C.read_fault(self._fault)
        if fault is not None:
            raise fatal_error(fault, self._budget_s)

    def _after(self) -> None:
        """A host operation has already failed or not when it returns: say so now."""
        if self._on_host:
            self._check_fatal()

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

    # ---- life -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything in flight and every fault. Collective, synchronises.

        Raises PeerTimeout if a rank does not come.
        """
        self._ops.synchronize()
        self.world.barrier()
        self._ops.native.reset()
        _C.clear_faults(self._fault)
        self._routing_told = 0
        self.set_time_budget(self._budget_s)
        self.world.barrier()

    def close(self) -> None:
        """Give the memory back; again: nothing. Waits a bounded time for the peers to close too.

        Finishes what was launched first. Received tensors stay valid, and keep their heap.
        """
        self._close(with_peers=True)

    def _close(self, with_peers: bool) -> None:
        if self._closed:
            return
        failed = _C.read_fault(self._fault) is not None
        self._closed = True
        heaps = [*self._retired, self._heap]
        if with_peers or failed:  # else kernels may wait for peers that never come
            self._ops.synchronize()
            self._close_memory(heaps, met=not failed and self._meet())
        else:
            for heap in heaps:
                heap.abandon()
            self._control.abandon()
        self._ops = cast(NormalOps, _Closed())

    def _close_memory(self, heaps: list[DataHeap], met: bool) -> None:
        for heap in heaps if met else ():
            heap.unmap_peers()
        # Freeing symmetric memory is collective: all ranks do it or none.
        held = any(heap.collective and heap.pool.blocks for heap in heaps)
        if not met or not self._agree_to_free(held):
            for heap in heaps:
                heap.abandon()
            self._control.close(lambda: False)
            return
        for heap in heaps:
            heap.retire()
        if self._control.kind == "ipc":  # peers' mappings first, then one more meeting
            self._control.close(self._meet)
        else:
            self._control.close(lambda: True)
        self._host_counts.close()

    def _agree_to_free(self, held: bool) -> bool:
        if self.virtual:
            return True
        try:
            told = self.world.all_gather(b"held" if held else b"", timeout_s=CLOSE_TIMEOUT_S)
        except EpError as error:
            log.warning("closing without the peers: %s", error)
            return False
        return not any(told)

    @property
    def virtual(self) -> bool:
        """True for one of several ranks of this process, whose memory all of them hold."""
        return self._control.kind.startswith("virtual")

    def _meet(self) -> bool:
        if self.virtual:
            return True
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
