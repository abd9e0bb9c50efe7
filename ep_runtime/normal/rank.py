"""What a rank of a normal buffer is besides its operations: memory, faults, time budget, life."""

from __future__ import annotations

from typing import Protocol, cast

import torch

from ep_runtime import env
from ep_runtime.errors import EpError, ShapeError
from ep_runtime.member import CLOSE_TIMEOUT_S, Closed, Member
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

WHOLE = _C.NormalPart(index=0, control_start=128, first=0, step=1)  # a group that is no part


class Provider(Protocol):
    """Gives a rank a new data heap of so many bytes. Collective; raises on every rank."""

    def __call__(self, num_bytes: int) -> RankMemory: ...


class NormalRank(Member):
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
        part: _C.NormalPart = WHOLE,
        sizes: HeapSizes | None = None,
    ) -> None:
        self._join(world, device, control.fault)
        self.config: NormalConfig = config
        self.memory_kind = control.kind
        self.stats = NormalStats()
        self.max_sms = max_sms
        self.num_sms = TunedSms(
            self._sms(num_sms.dispatch, DEFAULT_SMS), self._sms(num_sms.combine, DEFAULT_SMS)
        )
        self._provider = provider
        self._control = control
        self._part = part
        self._parts: tuple[NormalRank, ...] = ()  # groups inside this one that this rank is in
        self._copy_told = False
        self._most_received = 0  # rows of any rank, by any exact dispatch: all ranks know the same
        sizes = config.heap_sizes(self.num_ranks) if sizes is None else sizes
        self._heap = DataHeap(data, self.rank, sizes, device)
        self._retired: list[DataHeap] = []
        self._ops: NormalOps = self._make_ops()
        self._streams = StreamOrder(device)
        self._host_counts = HostCounts(self.num_ranks, config.max_experts, device)
        self._check = Checker(
            self.num_ranks, config.max_experts, config.max_topk, device, self._identity
        )
        self._ops.synchronize()
        self._apply_budget(env.read().warmup_timeout_s)

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
            self._part,
        )
        return NormalOps(native, self.device)

    @property
    def heap_sizes(self) -> HeapSizes:
        """The parts of the data heap as they are now; where there are nodes, of all heaps."""
        sizes = [self._heap.sizes, *(part.heap_sizes for part in self._parts)]
        return HeapSizes(
            sum(one.staging for one in sizes),
            sum(one.inbox for one in sizes),
            sum(one.pool for one in sizes),
        )

    @property
    def pool_in_use(self) -> int:
        """Bytes of the pool that received tensors (or captures) hold."""
        return self._heap.pool.in_use + sum(part.pool_in_use for part in self._parts)

    def _sms(self, wanted: int | None, default: int) -> int:
        """SMs of one call. Ranks that share a GPU have to run at the same time: see max_sms."""
        if wanted is None:
            return default
        if type(wanted) is not int or wanted < 1:
            raise ShapeError(f"num_sms={wanted!r}: it must be an integer from 1 on; 24 is usual")
        return min(wanted, self.max_sms)

    def _after(self) -> None:
        """A host operation has already failed or not when it returns: say so now."""
        if self._on_host:
            self._check_fatal()

    def _apply_budget(self, seconds: float) -> None:
        super()._apply_budget(seconds)
        for part in self._parts:
            part._apply_budget(seconds)

    # ---- life -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything in flight and every fault. Collective, synchronises.

        Raises PeerTimeout if a rank does not come: call it again on every rank, with no operation
        in between.
        """
        self._ops.synchronize()
        self.world.between_meetings(self._forget_all)

    def _forget_all(self) -> None:
        for one in (self, *self._parts):
            one._ops.native.reset()
        self._reset_wire()
        _C.clear_faults(self._fault)
        self._most_received = 0  # ranks that gave up did not learn what others did
        self._routing_told = 0
        self._apply_budget(self._budget_s)

    def _reset_wire(self) -> None:
        """Forget what peers put and this rank counted of it; there is nothing of it here."""

    def _close(self, with_peers: bool) -> None:
        if self._closed:
            return
        failed = _C.read_fault(self._fault) is not None
        self._closed = True
        try:
            for part in self._parts:
                part._close(with_peers)
            if with_peers or failed:  # else kernels may wait for peers that never come
                self._ops.synchronize()
                heaps = [*self._retired, self._heap]
                self._close_memory(heaps, met=not failed and self._meet())
            else:
                self._abandon()
        except BaseException:
            for one in (*self._parts, self):  # nobody knows what still runs
                one._abandon()
            raise
        self._ops = cast(NormalOps, Closed(type(self).__name__))

    def _abandon(self) -> None:
        """Close, and keep all memory until the process ends: something may still write to it."""
        self._closed = True
        for heap in (*self._retired, self._heap):
            heap.abandon()
        self._control.owned.append(self._host_counts)  # a notify in flight writes there as well
        self._control.abandon()
        self._ops = cast(NormalOps, Closed(type(self).__name__))

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
            told = self._farewell.all_gather(b"held" if held else b"", timeout_s=CLOSE_TIMEOUT_S)
        except EpError as error:
            log.warning("closing without the peers: %s", error)
            return False
        return not any(told)

    @property
    def virtual(self) -> bool:
        """True for one of several ranks of this process, whose memory all of them hold."""
        return self._control.kind.startswith("virtual")

    def _meet(self) -> bool:
        return self.virtual or super()._meet()
