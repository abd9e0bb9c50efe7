"""Native module: addresses and stream handles are plain integers; nothing of torch crosses."""

from typing import Final

has_cuda: Final[bool]
cuda_archs: Final[str]  # comma-separated, such as "90,100"; empty without CUDA
build_info: Final[str]  # which nvcc compiled the CUDA backend, or why there is none

class Fault:
    """One fault record. code: see FAULT_* below; op: OP_*; peer -1 when no peer is to blame."""

    @property
    def code(self) -> int: ...
    @property
    def op(self) -> int: ...
    @property
    def chain(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def expected(self) -> int: ...
    @property
    def seen(self) -> int: ...

FAULT_NONE: Final[int]
FAULT_TIMEOUT: Final[int]  # peer did not arrive
FAULT_ABORTED: Final[int]  # another rank (field rank) gave up waiting for `peer`
FAULT_DESYNC: Final[int]  # a tag from the future
FAULT_SEQUENCE: Final[int]  # dispatch twice, or combine without dispatch, on one chain
FAULT_COUNT: Final[int]  # a peer announced more messages than the inbox holds
FAULT_ROUTING: Final[int]  # expert out of range or twice in a token (not fatal)
OP_DISPATCH: Final[int]
OP_COMBINE: Final[int]

WIRE_BF16: Final[int]
WIRE_FP8: Final[int]
RECV_BATCHED: Final[int]
RECV_CONTIGUOUS: Final[int]
RECV_COMPACT: Final[int]

def limits() -> dict[str, int]:
    """max_ranks, max_topk, max_hidden, max_experts, max_chains, max_tokens, hidden_multiple."""

class Shape:
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        topk: int,
        hidden: int,
        max_tokens: int,
        num_chains: int,
        wire: int,
    ) -> None: ...

def layout(shape: Shape) -> dict[str, int]:
    """Bytes and offsets: heap_bytes, local_bytes, message_bytes, message_lines, message_stride,
    combine_stride, counts_stride, stats_offset, stats_stride, stats_bytes (per chain, local
    memory)."""

def fault_bytes() -> int: ...
def read_fault(address: int) -> Fault | None:
    """The fatal record, or None."""

def read_routing_fault(address: int) -> Fault | None: ...
def clear_faults(address: int) -> None: ...

class RecvTarget:
    """Where dispatch_recv puts rows. Addresses; 0 where the format has no such array."""

    def __init__(
        self,
        *,
        format: int,
        alignment: int,
        x: int,
        scales: int,
        recv_count: int,
        expert_offset: int,
        topk_idx: int,
        topk_weights: int,
        num_messages: int,
    ) -> None: ...

class HostRank:
    """A CPU rank. Waits spin, then yield; the GIL is released."""

    def __init__(
        self, shape: Shape, rank: int, heaps: list[int], local: int, fault: int
    ) -> None: ...
    def dispatch_send(
        self,
        chain: int,
        x: int,
        x_stride: int,
        topk_idx: int,
        idx_bytes: int,
        weights: int,
        num_tokens: int,
        num_tokens_address: int,
    ) -> None: ...
    def dispatch_recv(self, chain: int, target: RecvTarget) -> None: ...
    def combine_send(self, chain: int, y: int, y_stride: int) -> None: ...
    def combine_recv(
        self, chain: int, out: int, num_tokens: int, num_tokens_address: int
    ) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None: ...
    def read_stats(self, chain: int) -> dict[str, int]: ...
    def read_state(self, chain: int) -> tuple[int, int]:
        """(dispatched, combined) epochs."""

    def reset(self) -> None:
        """Zero this rank's heap and local memory, not the faults. Ranks meet before and after."""

class CudaRank:
    """A GPU rank. Every operation only launches kernels on `stream` (a cudaStream_t as an int).

    num_sms 0: all SMs. expected_tokens: most tokens any rank sends now (sizes the grid; any value
    is correct), 0: max_tokens. pdl: programmatic dependent launch.
    """

    def __init__(
        self,
        shape: Shape,
        rank: int,
        heaps: list[int],
        local: int,
        fault: int,
        device: int,
        num_sms: int,
        pdl: bool,
    ) -> None: ...
    def dispatch_send(
        self,
        chain: int,
        x: int,
        x_stride: int,
        topk_idx: int,
        idx_bytes: int,
        weights: int,
        num_tokens: int,
        num_tokens_address: int,
        stream: int,
    ) -> None: ...
    def dispatch_recv(
        self, chain: int, target: RecvTarget, expected_tokens: int, stream: int
    ) -> None: ...
    def dispatch_fused(
        self,
        chain: int,
        x: int,
        x_stride: int,
        topk_idx: int,
        idx_bytes: int,
        weights: int,
        num_tokens: int,
        num_tokens_address: int,
        target: RecvTarget,
        expected_tokens: int,
        stream: int,
    ) -> None: ...
    def combine_send(
        self, chain: int, y: int, y_stride: int, expected_tokens: int, stream: int
    ) -> None: ...
    def combine_recv(
        self, chain: int, out: int, num_tokens: int, num_tokens_address: int, stream: int
    ) -> None: ...
    def combine_fused(
        self,
        chain: int,
        y: int,
        y_stride: int,
        out: int,
        num_tokens: int,
        num_tokens_address: int,
        expected_tokens: int,
        stream: int,
    ) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None:
        """Synchronises the device copy; not for captured code."""

    def read_stats(self, chain: int) -> dict[str, int]:
        """Synchronises. messages_sent, messages_received, rows_received, bytes_dispatched,
        bytes_combined."""

    def read_state(self, chain: int) -> tuple[int, int]: ...
    def reset(self) -> None: ...

class HostMemory:
    """Zeroed, page-aligned memory of this process."""

    def __init__(self, num_bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...

class ShmSegment:
    """POSIX shared memory, mode 0600. create=True makes it (fails if it exists) and zeroes it."""

    def __init__(self, name: str, num_bytes: int, create: bool) -> None: ...
    @property
    def address(self) -> int: ...
    def unlink(self) -> None: ...
    def close(self) -> None: ...

class DeviceMemory:
    """cudaMalloc on one device, zeroed."""

    def __init__(self, num_bytes: int, device: int) -> None: ...
    @property
    def address(self) -> int: ...
    def ipc_handle(self) -> bytes: ...
    def close(self) -> None: ...

class IpcMapping:
    """Another process's DeviceMemory, mapped here."""

    def __init__(self, handle: bytes, device: int) -> None: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...

class PinnedMemory:
    """Host memory mapped into the devices at the same address (fault records)."""

    def __init__(self, num_bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...

def cuda_device_count() -> int: ...
def cuda_device_attributes(device: int) -> dict[str, int]:
    """num_sms, major, minor, ..."""

def enable_peer_access(device: int, peer: int) -> None: ...
def can_access_peer(device: int, peer: int) -> bool: ...
def cuda_fill_zero(address: int, num_bytes: int, device: int) -> None:
    """Synchronous memset, for memory this module did not allocate (an NVSHMEM heap)."""
