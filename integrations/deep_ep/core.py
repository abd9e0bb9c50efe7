"""What a deep_ep Buffer is besides its operations: life, streams, sizes, configuration."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ep_runtime.errors import ConfigError, SequenceError, ShapeError
from ep_runtime.integrations.deep_ep import config as tuning
from ep_runtime.integrations.deep_ep import low_latency
from ep_runtime.integrations.deep_ep.config import Config, plain
from ep_runtime.integrations.deep_ep.events import EventHandle, EventOverlap
from ep_runtime.integrations.deep_ep.group import Comm, world_of
from ep_runtime.integrations.deep_ep.low_latency import LowLatency
from ep_runtime.integrations.deep_ep.mask import RankMask
from ep_runtime.integrations.deep_ep.normal import Normal
from ep_runtime.integrations.deep_ep.place import Place
from ep_runtime.native import _C
from ep_runtime.normal.tuned import TunedSms, tuned_num_sms

DEFAULT_SMS = 20

# Of Buffers that were dropped without destroy(): peers may be anywhere and kernels in flight, so
# nothing is freed under them.
_kept: list[object] = []


class Core:
    """Base of Buffer: everything that no token goes through."""

    num_sms: ClassVar[int] = DEFAULT_SMS
    _sms_chosen: ClassVar[bool] = False
    # Programs compare it with 2 * (M + 1). There are no queue pairs: any M that calls take fits.
    nvshmem_qp_depth: ClassVar[int] = 2 * (_C.limits()["max_tokens"] + 1)
    _closed = True  # until the constructor is through: what failed in it has nothing to keep

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Comm | None = None,
    ) -> None:
        """Join the group. Collective.

        group               a torch.distributed group of any backend; only its store is used
        num_nvl_bytes       memory for received tensors of the normal calls; 0: none are made
        num_rdma_bytes      checked and kept; low-latency memory is sized by the calls
        low_latency_mode    allow low-latency calls
        explicitly_destroy  destroy() gives the memory back; else it stays until the process ends
        enable_shrink       allow the mask calls; clean_low_latency_buffer() then also resets
        comm                an mpi4py communicator, where `group` is None
        Memory is allocated in the first call that needs it. What concerns networks
        (num_qps_per_rank, allow_*, use_fabric) has no effect. Raises ConfigError.
        """
        num_nvl_bytes, num_rdma_bytes = plain(num_nvl_bytes), plain(num_rdma_bytes)
        _check_bytes(num_nvl_bytes, num_rdma_bytes)
        num_qps_per_rank = plain(num_qps_per_rank)
        if low_latency_mode and (type(num_qps_per_rank) is not int or num_qps_per_rank < 1):
            raise ConfigError(
                f"num_qps_per_rank={num_qps_per_rank!r} with low_latency_mode=True: it must be at"
                " least 1; the number of local experts is usual"
            )
        del allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric  # one machine, one fabric
        world = world_of(group, comm)
        self.group = comm if group is None else group
        self.rank = world.rank
        self.group_size = world.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._place = Place(world)
        self._mask = RankMask(self._place, enable_shrink)
        self._low_latency = LowLatency(self._place, self._mask)
        self._normal = Normal(self._place, num_nvl_bytes)
        self._scratch: dict[bool, torch.Tensor] = {}
        self._closed = False

    # ---- life -----------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Finish what was launched and give the memory back. Collective; again: nothing.

        Raises SequenceError unless the Buffer was built with explicitly_destroy=True.
        """
        if not self.explicitly_destroy:
            raise SequenceError(
                "destroy() of a Buffer with explicitly_destroy=False: build it with True"
            )
        if not self._closed:
            self._closed = True
            self._low_latency.close()
            self._normal.close()
            self._scratch.clear()

    def __del__(self) -> None:
        if not self._closed:
            _kept.append((self._low_latency, self._normal))

    @staticmethod
    def is_sm90_compiled() -> bool:
        """The native module has kernels for Hopper GPUs."""
        return bool(_C.has_cuda)

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous calls; on the CPU torch's stand-in for one."""
        stream = self._place.comm.stream
        return torch.cpu.current_stream() if stream is None else stream

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of symmetric memory that low-latency calls of these sizes take at most."""
        return low_latency.size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """num_nvl_bytes (or num_rdma_bytes) of memory, as `dtype`, from byte `offset`.

        Memory of its own, which the operations never touch: whatever is written here harms none.
        size  shape of the result; None: flat, to the end. Raises ShapeError if it does not fit.
        """
        self._check_open()
        total = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if offset < 0 or offset > total or offset % dtype.itemsize:
            raise ShapeError(
                f"offset={offset}: it must be a multiple of {dtype.itemsize} bytes, 0 to {total}"
            )
        if use_rdma_buffer not in self._scratch:
            self._place.refuse_capture("the first get_local_buffer_tensor()", "call it once")
        usable = (total - offset) // dtype.itemsize * dtype.itemsize
        with torch.inference_mode(False):  # else nobody could write to it outside of that mode
            if use_rdma_buffer not in self._scratch:
                self._scratch[use_rdma_buffer] = torch.zeros(
                    total, dtype=torch.uint8, device=self._place.device
                )
            flat = self._scratch[use_rdma_buffer][offset : offset + usable].view(dtype)
        if size is None:
            return flat
        if flat.numel() < size.numel():
            raise ShapeError(
                f"size={list(size)} has {size.numel()} elements of {dtype}: {flat.numel()} fit"
                f" behind offset {offset}; pass a smaller one or build the Buffer with more bytes"
            )
        return flat[: size.numel()].view(size)

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """The Config that dispatch uses by default.

        Its number of SMs is what set_num_sms() was given, or else what `ep-runtime tune` found for
        this machine, or else 20.
        """
        return tuning.dispatch_config(num_ranks, cls._sms(num_ranks).dispatch)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """The Config that combine uses by default: see get_dispatch_config."""
        return tuning.combine_config(num_ranks, cls._sms(num_ranks).combine)

    @classmethod
    def _sms(cls, num_ranks: int) -> TunedSms:
        if cls._sms_chosen or cls.num_sms != DEFAULT_SMS:  # some programs assign it
            return TunedSms(cls.num_sms, cls.num_sms)
        return _tuned(num_ranks)

    def _check_open(self) -> None:
        if self._closed:
            raise SequenceError("call on a destroyed Buffer: build a new one")

    def _check_low_latency(self) -> None:
        self._check_open()
        if not self.low_latency_mode:
            raise SequenceError(
                "low-latency call on a Buffer with low_latency_mode=False: build it with True"
            )


@functools.cache  # a file: not to be read by every call
def _tuned(num_ranks: int) -> TunedSms:
    """Measured numbers of SMs, made even as DeepEP's are."""
    found = tuned_num_sms(num_ranks, default=TunedSms(DEFAULT_SMS, DEFAULT_SMS))
    return TunedSms(max(found.dispatch // 2 * 2, 2), max(found.combine // 2 * 2, 2))


def _check_bytes(num_nvl_bytes: int, num_rdma_bytes: int) -> None:
    for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
        if type(value) is not int or value < 0 or value % tuning.ALIGNMENT:
            known = value if type(value) is int else 0
            below = max(known, 0) // tuning.ALIGNMENT * tuning.ALIGNMENT
            raise ConfigError(
                f"{name}={value!r}: it must be a multiple of {tuning.ALIGNMENT} from 0 on, for"
                f" example {below}"
            )
    if num_rdma_bytes and num_nvl_bytes > 2**31 - 1:
        raise ConfigError(
            f"num_nvl_bytes={num_nvl_bytes} with num_rdma_bytes={num_rdma_bytes}: it must be at"
            f" most {2**31 - 1} there"
        )
