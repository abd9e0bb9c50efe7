"""What a rank is besides its operations: memory, faults, time budget, statistics, life."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from ep_runtime import env
from ep_runtime.config import DispatchFormat, EpConfig, ScaleFormat
from ep_runtime.errors import ConfigError
from ep_runtime.handles import Received, StepStats, Uses
from ep_runtime.layout import layout_of, shape_of
from ep_runtime.masks import Masks
from ep_runtime.member import Closed, Member
from ep_runtime.memory import RankMemory
from ep_runtime.native import _C
from ep_runtime.ops import Ops, make_ops
from ep_runtime.order import OpName, SendOrder
from ep_runtime.pending import Pending
from ep_runtime.receive import ReceiveBuffer, allocate_receive
from ep_runtime.validate import Checker
from ep_runtime.world import World

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


class Rank(Masks, Member):
    """Base of Buffer: everything about one rank that no token goes through."""

    def _assemble(
        self,
        config: EpConfig,
        world: World,
        device: torch.device,
        memory: RankMemory,
        order: SendOrder | None,
    ) -> None:
        self._join(world, device, memory.fault)
        self.config: EpConfig = config
        self.memory_kind = memory.kind
        self._memory = memory
        self._order = order
        self._ops: Ops = make_ops(config, self.rank, memory, device)
        self._checker = Checker(config, self.num_ranks, device, self._identity)
        self._shape = shape_of(config, self.num_ranks)
        self._resets = Uses()
        self._inboxes = [self._receive(zeroed=True) for _ in range(config.num_chains)]
        # Sends that were not waited for.
        self._open: dict[tuple[OpName, int], Pending[Received] | Pending[torch.Tensor]] = {}
        # Told of every operation before it is launched; what it raises keeps it from being.
        self.recorder: Callable[[OpRecord], None] | None = None
        self._ops.synchronize()
        self._apply_budget(env.read().warmup_timeout_s)

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
        scale_format         None: the configuration's; opaque rows keep their scales ("float32")
        column_major_scales  scales lie with stride 1 over rows, as DeepGEMM's grouped GEMMs and
                             DeepEP's callers expect
        Allocates; not for captured code, unless torch's capture pool may own the tensors.
        Raises ConfigError for a format that this Buffer's heap has no room for, and for a
        scale_format that there is not or that opaque rows cannot have.
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
        if wanted not in get_args(DispatchFormat):
            raise ConfigError(
                f"dispatch_format={wanted!r}: it must be one of"
                f" {', '.join(get_args(DispatchFormat))}"
            )
        if wanted != config.dispatch_format and (config.dispatch_format, wanted) != ("bf16", "fp8"):
            raise ConfigError(
                f"dispatch_format={wanted!r} on a Buffer made for {config.dispatch_format!r}: only"
                " one made for 'bf16' has room for another ('fp8'); build the EpConfig with the"
                " format you need"
            )
        scaled = config.scale_format if scale_format is None else scale_format
        if scaled not in get_args(ScaleFormat):
            raise ConfigError(
                f"scale_format={scaled!r}: it must be one of {', '.join(get_args(ScaleFormat))}"
            )
        if wanted == "opaque" and scaled != "float32":
            raise ConfigError(
                f"scale_format={scaled!r} for opaque rows: it says how ep_runtime quantises, and"
                " opaque scales arrive as the caller made them; leave it out"
            )
        # They are used outside of inference mode too, where its tensors could not be.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return allocate_receive(
                config,
                self.num_ranks,
                self.device,
                self._identity,
                self._resets,
                wanted,
                scaled,
                column_major_scales,
                zeroed,
            )

    # ---- statistics -----------------------------------------------------------------------------

    def stats(self, chain: int = 0) -> StepStats:
        """What `chain` moved since its statistics were last zeroed. Synchronises.

        Raises ConfigError if there is no such chain.
        """
        self._require_chain(chain)
        values = self._ops.native.read_stats(chain)
        sums = {name: value for name, value in values.items() if isinstance(value, int)}
        return StepStats(**sums, wait_ns=tuple(values["wait_ns"][: self.num_ranks]))

    def stats_region(self, chain: int) -> tuple[int, int]:
        """(address, bytes) of the chain's statistics: local memory, which a reset node zeroes.

        Raises ConfigError if there is no such chain.
        """
        self._require_chain(chain)
        self._require_open()
        layout = layout_of(self.config, self.num_ranks)
        offset = layout.stats_offset + chain * layout.stats_stride
        return self._memory.local + offset, layout.stats_bytes

    def heap_regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of every rank's heap as this rank sees it: peers write them."""
        self._require_open()
        num_bytes = layout_of(self.config, self.num_ranks).sizes.heap
        return [(address, num_bytes) for address in self._memory.heaps]

    def epochs(self, chain: int = 0) -> tuple[int, int]:
        """(dispatched, combined) of the chain's device words. Synchronises; for diagnosis.

        Raises ConfigError if there is no such chain.
        """
        self._require_chain(chain)
        return self._ops.native.read_state(chain)

    def _require_chain(self, chain: int) -> None:
        if type(chain) is not int or not 0 <= chain < self.config.num_chains:
            raise ConfigError(
                f"chain={chain!r}: the chains are 0 .. {self.config.num_chains - 1}; build the"
                " EpConfig with a larger num_chains for more"
            )

    # ---- life -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything in flight and every fault. Collective, synchronises.

        Ranks of processes meet before and after, but those that are masked; virtual ranks are reset
        one by one, all of them before the next operation. Masks stay. What was sent and not waited
        for is dropped: its wait() raises SequenceError, and so does a combine of a handle from
        before (do not replay a graph that combines one). Raises PeerTimeout if a rank does not come
        (call it again on every rank, with no operation in between, or mask that one on all others
        first), ConfigError if ranks have different masks.
        """
        self._ops.synchronize()
        self.world.between_meetings(self._forget_all, self.masked_ranks())

    def _forget_all(self) -> None:
        self._ops.native.reset()
        _C.clear_faults(self._fault)
        self._routing_told = 0
        self._resets.count += 1
        # Their wait() would wait for what nobody sends, or take what is sent from now on.
        for pending in self._open.values():
            pending.drop()
        self._open.clear()
        if self._order is not None:
            self._order.forget(self.rank)
        self._apply_budget(self._budget_s)

    def _close(self, with_peers: bool) -> None:
        if self._closed:
            return
        failed = _C.read_fault(self._fault) is not None
        self._closed = True
        try:
            if with_peers or failed:  # else kernels may wait for peers that never come
                self._ops.synchronize()
                # A masked rank may be anywhere, and may still write here.
                alone = not self.virtual and (failed or bool(self.masked_ranks()))
                self._memory.close((lambda: False) if alone else self._meet)
            else:
                self._memory.abandon()
        except BaseException:
            self._memory.abandon()  # nobody knows what still runs
            raise
        finally:
            self._ops = cast(Ops, Closed(type(self).__name__))
