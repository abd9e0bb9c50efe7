"""Native module: addresses and stream handles are plain integers; nothing of torch crosses."""

from typing import Any, Final

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
FAULT_COUNT: Final[int]  # a peer announced more messages than the inbox holds
FAULT_ROUTING: Final[int]  # expert out of range or twice in a token (not fatal)
FAULT_TERMS: Final[int]  # terms differ: mask (low 32 bits), format (8 bits), late weights (1 bit)
OP_DISPATCH: Final[int]
OP_COMBINE: Final[int]
OP_NORMAL_NOTIFY: Final[int]
OP_NORMAL_DISPATCH: Final[int]
OP_NORMAL_COMBINE: Final[int]

WIRE_BF16: Final[int]
WIRE_FP8: Final[int]
WIRE_OPAQUE: Final[int]
BLOCK_EXACT: Final[int]
"""A dispatch's block has as many rows as come."""
BLOCK_PADDED: Final[int]
"""Any number of rows: those that nobody sent get topk_idx -1 and topk_weights 0."""
BLOCK_AHEAD: Final[int]
"""As many on every rank as have it so: nothing happens if more come to some rank."""
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
        opaque_row_bytes: int = 0,
        opaque_scales: int = 0,
        combine_wire: int = ...,
    ) -> None: ...

def layout(shape: Shape) -> dict[str, int]:
    """Bytes and offsets: heap_bytes, local_bytes, routing_bytes, message_bytes, message_lines,
    message_stride, dispatch_offset (of chain 0, even epochs), dispatch_half (to odd ones),
    combine_stride, combine_bytes, counts_stride, stats_offset, stats_stride, stats_bytes (per
    chain, local memory)."""

def fault_bytes() -> int: ...
def read_fault(address: int) -> Fault | None:
    """The fatal record, or None."""

def read_routing_fault(address: int) -> Fault | None: ...
def clear_faults(address: int) -> None: ...

class SendInput:
    """What dispatch_send sends. Addresses; 0: none. Strides: of x in bytes, of scales in words.

    routing: the handle's memory, layout()["routing_bytes"] bytes, 8-byte aligned. weights 0: they
    come with the combine.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        routing: int,
        wire: int,
        round_scale: bool = False,
        x: int,
        x_stride: int,
        scales: int = 0,
        scale_row_stride: int = 0,
        scale_group_stride: int = 0,
        topk_idx: int,
        idx_bytes: int,
        weights: int,
        num_tokens: int,
        num_tokens_address: int = 0,
    ) -> None: ...

class RecvTarget:
    """Where dispatch_recv puts rows. Addresses; 0 where the format has no such array."""

    def __init__(
        self,
        shape: Shape,
        *,
        routing: int,
        format: int,
        wire: int,
        alignment: int = 1,
        x: int,
        num_rows: int,
        scales: int = 0,
        ue8m0: bool = False,
        scale_expert_stride: int = 0,
        scale_row_stride: int = 0,
        scale_group_stride: int = 0,
        recv_count: int,
        expert_offset: int = 0,
        topk_idx: int = 0,
        topk_weights: int = 0,
        num_messages: int,
        source_token: int,
        layout_range: int = 0,
        cumulative_count: int = 0,
        wait_ns: int = 0,
    ) -> None: ...

class CombineInput:
    """What combine_send sends: y_stride in elements. late_weights: the dispatch had none.

    wire: how the sums travel, WIRE_BF16 (the default) or WIRE_FP8; it and late_weights are the
    same in CombineOutput.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        routing: int,
        wire: int = ...,
        y: int,
        y_stride: int,
        late_weights: bool = False,
        weights: int = 0,
        num_tokens: int = 0,
    ) -> None: ...

class CombineOutput:
    """Where combine_recv adds up."""

    def __init__(
        self,
        shape: Shape,
        *,
        routing: int,
        wire: int = ...,
        late_weights: bool = False,
        out: int,
        num_tokens: int,
        num_tokens_address: int = 0,
        wait_ns: int = 0,
    ) -> None: ...

class HostRank:
    """A CPU rank. Waits spin, then yield; the GIL is released."""

    def __init__(
        self, shape: Shape, rank: int, heaps: list[int], local: int, fault: int
    ) -> None: ...
    def dispatch_send(self, chain: int, input: SendInput) -> None: ...
    def dispatch_recv(self, chain: int, target: RecvTarget) -> None: ...
    def combine_send(self, chain: int, input: CombineInput) -> None: ...
    def combine_recv(self, chain: int, output: CombineOutput) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None: ...
    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Operations that begin after it leave the rank out (or no longer do)."""

    def clear_rank_mask(self) -> None: ...
    def read_rank_mask(self) -> list[int]:
        """Ranks that are masked, in order."""

    def read_stats(self, chain: int) -> dict[str, Any]: ...
    def read_state(self, chain: int) -> tuple[int, int]:
        """(dispatched, combined) epochs."""

    def reset(self) -> None:
        """Zero this rank's heap and local memory, not the faults, the time budget and the mask.
        Ranks meet before and after."""

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
    def dispatch_send(self, chain: int, input: SendInput, stream: int) -> None: ...
    def dispatch_recv(
        self, chain: int, target: RecvTarget, expected_tokens: int, stream: int
    ) -> None: ...
    def dispatch_fused(
        self,
        chain: int,
        input: SendInput,
        target: RecvTarget,
        expected_tokens: int,
        stream: int,
    ) -> None: ...
    def combine_send(
        self, chain: int, input: CombineInput, expected_tokens: int, stream: int
    ) -> None: ...
    def combine_recv(self, chain: int, output: CombineOutput, stream: int) -> None: ...
    def combine_fused(
        self,
        chain: int,
        input: CombineInput,
        output: CombineOutput,
        expected_tokens: int,
        stream: int,
    ) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None:
        """Synchronises the device copy; not for captured code."""

    def set_rank_mask(self, rank: int, masked: bool, stream: int) -> None:
        """As of HostRank, for operations behind it in stream order. Capturable."""

    def clear_rank_mask(self, stream: int) -> None: ...
    def write_rank_mask(self, address: int, stream: int) -> None:
        """1 for each masked rank, else 0, into int32 [num_ranks]. Capturable."""

    def read_rank_mask(self) -> list[int]:
        """Synchronises."""

    def read_stats(self, chain: int) -> dict[str, Any]:
        """Synchronises. messages_sent, messages_received, rows_received, bytes_dispatched,
        bytes_combined, and wait_ns: a list by source."""

    def read_state(self, chain: int) -> tuple[int, int]: ...
    def reset(self) -> None: ...

def normal_layout(num_ranks: int, max_experts: int, start: int = 128) -> dict[str, int]:
    """Of the normal operations: control_bytes (heap of words), local_bytes."""

def normal_block(rows: int, row_bytes: int, num_scales: int, topk: int) -> dict[str, int]:
    """A dispatch's receive memory: offsets scales, topk_idx, topk_weights, source_token, x; bytes.
    The rows, x, come last."""

def normal_inbox(rows: int, hidden: int, topk: int) -> dict[str, int]:
    """Where a combine's BF16 rows come home. Rows at 0; offsets packed, topk_weights; bytes."""

class NormalPart:
    """One of the groups that a rank takes part in, over the same control heap and fault board.

    index          of its own words behind those of the first part
    control_start  bytes into the control heap; a multiple of 128
    first, step    records call its rank r `first + r * step`
    """

    def __init__(self, index: int, control_start: int, first: int, step: int) -> None: ...

def host_by_node(
    num_nodes: int,
    ranks_per_node: int,
    rank: int,
    is_token_in_rank: int,
    num_tokens: int,
    is_token_in_node: int,
    tokens_per_node: int,
    named: int,
) -> None:
    """Fill bool [T, N] and int32 [N]; and int32 [T, R] with ranks' numbers or -1, unless 0."""

def host_node_tables(
    num_nodes: int,
    ranks_per_node: int,
    rank: int,
    rank_prefix: int,
    rail_prefix: int,
    goes: int,
    rail_rows: int,
    num_rows: int,
    node_prefix: int,
    position: int,
    reach: int,
    target: int,
    order: int,
) -> None:
    """What a rank's part in its node needs: see csrc/ep/nodes.h. Addresses of int32 tensors, and
    of goes: bool [rail_rows, ranks_per_node]."""

def wire_region(
    num_nodes: int,
    ranks_per_node: int,
    max_experts: int,
    max_tokens: int,
    max_hidden: int,
    max_topk: int,
) -> dict[str, int]:
    """What peers put into (csrc/ep/wire.h): bytes; offset data; in the data: inbox, mirrors,
    partial, partial_weights, data_bytes; counters, bytes of a rank's own."""

class HostWire:
    """A CPU rank's end of rails by puts. whole, rail: on loopbacks; regions: of every rank."""

    def __init__(
        self,
        whole: HostNormal,
        rail: HostNormal,
        num_nodes: int,
        ranks_per_node: int,
        rank: int,
        max_experts: int,
        max_tokens: int,
        max_hidden: int,
        max_topk: int,
        regions: list[int],
        counters: int,
    ) -> None: ...
    def announce(self, per_rank: int, per_node: int, per_expert: int, num_experts: int) -> None: ...
    def await_messages(self, num_experts: int) -> None: ...
    def tables(
        self,
        rail_prefix: int,
        num_tokens: int,
        out_prefix: int,
        home_prefix: int,
        home_order: int,
    ) -> None: ...
    def put(
        self,
        home: bool,
        rail_prefix: int,
        row_bytes: int,
        num_scales: int,
        topk: int,
        has_idx: bool,
        has_weights: bool,
        block_rows: int,
        num_sms: int,
    ) -> None: ...
    def await_rows(self, home: bool) -> None: ...
    def reset(self) -> None: ...

class HostNormal:
    """A CPU rank's normal operations. Addresses of tensors; 0 where there is none (a tensor without
    elements has none either: topk, num_scales and out_weights say what is in use).

    control, data: every rank's heaps as this process sees them; control heaps and local are zeroed
    when they are new. An operation returns when it is done, or has recorded why not.
    """

    def __init__(
        self,
        num_ranks: int,
        rank: int,
        max_experts: int,
        control: list[int],
        data: list[int],
        data_bytes: int,
        local: int,
        fault: int,
        part: NormalPart = ...,
    ) -> None: ...
    def layout(
        self,
        topk_idx: int,
        idx_bytes: int,
        num_tokens: int,
        topk: int,
        num_experts: int,
        tokens_per_rank: int,
        tokens_per_expert: int,
        is_token_in_rank: int,
    ) -> None: ...
    def notify(
        self,
        tokens_per_rank: int,
        tokens_per_expert: int,
        is_token_in_rank: int,
        num_tokens: int,
        num_experts: int,
        alignment: int,
        rank_prefix: int,
        send_position: int,
        recv_counts: int,
        host_counts: int,
    ) -> None:
        """host_counts int32: rows, rows per local expert [L], the epoch (written last), the most
        rows of any rank, the most tokens that one rank sends to others."""

    def dispatch(
        self,
        x: int,
        x_stride_bytes: int,
        row_bytes: int,
        scales: int,
        scale_stride_token: int,
        scale_stride_group: int,
        num_scales: int,
        topk_idx: int,
        idx_bytes: int,
        topk_weights: int,
        topk: int,
        num_experts: int,
        send_position: int,
        rank_prefix: int,
        num_tokens: int,
        block_offset: int,
        block_rows: int,
        size: int,
        num_sms: int,
        source_token: int,
    ) -> None:
        """size: a BLOCK_ constant. Weights without topk_idx arrive whole, with it 0 where the
        expert is another rank's."""

    def combine(
        self,
        x: int,
        x_stride_bytes: int,
        hidden: int,
        topk_weights: int,
        topk: int,
        bias0: int,
        bias1: int,
        send_position: int,
        rank_prefix: int,
        num_tokens: int,
        inbox_offset: int,
        out: int,
        out_weights: int,
        num_sms: int,
        order: int,
    ) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None: ...
    def read_state(self) -> tuple[int, int, int]:
        """(notified, dispatched, combined) epochs."""

    def reset(self) -> None:
        """Zero this rank's control heap and epochs, not the faults. Ranks meet before and after."""

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

def load_node_kernels(device: int) -> None: ...
def cuda_by_node(
    num_nodes: int,
    ranks_per_node: int,
    rank: int,
    is_token_in_rank: int,
    num_tokens: int,
    is_token_in_node: int,
    tokens_per_node: int,
    named: int,
    device: int,
    stream: int,
) -> None:
    """As host_by_node, launched on `stream`; capturable."""

def cuda_node_tables(
    num_nodes: int,
    ranks_per_node: int,
    rank: int,
    rank_prefix: int,
    rail_prefix: int,
    goes: int,
    rail_rows: int,
    num_rows: int,
    node_prefix: int,
    position: int,
    reach: int,
    target: int,
    order: int,
    device: int,
    stream: int,
) -> None:
    """As host_node_tables, launched on `stream`; capturable."""

class CudaWire:
    """A GPU rank's end of rails by puts: as HostWire, launched on `stream`; puts go over mapped
    memory. mine, counters, abort_word: addresses that NVSHMEM's puts take."""

    def __init__(
        self,
        whole: CudaNormal,
        rail: CudaNormal,
        num_nodes: int,
        ranks_per_node: int,
        rank: int,
        max_experts: int,
        max_tokens: int,
        max_hidden: int,
        max_topk: int,
        regions: list[int],
        counters: int,
        device: int,
    ) -> None: ...
    @property
    def mine(self) -> int: ...
    @property
    def counters(self) -> int: ...
    @property
    def abort_word(self) -> int: ...
    def announce(
        self, per_rank: int, per_node: int, per_expert: int, num_experts: int, stream: int
    ) -> None: ...
    def await_messages(self, num_experts: int, stream: int) -> None: ...
    def tables(
        self,
        rail_prefix: int,
        num_tokens: int,
        out_prefix: int,
        home_prefix: int,
        home_order: int,
        stream: int,
    ) -> None: ...
    def put(
        self,
        home: bool,
        rail_prefix: int,
        row_bytes: int,
        num_scales: int,
        topk: int,
        has_idx: bool,
        has_weights: bool,
        block_rows: int,
        num_sms: int,
        stream: int,
    ) -> None: ...
    def await_rows(self, home: bool, stream: int) -> None: ...
    def reset(self) -> None:
        """Synchronises."""

class CudaNormal:
    """A GPU rank's normal operations: as HostNormal, launched on `stream`. At most num_sms CTAs."""

    def __init__(
        self,
        num_ranks: int,
        rank: int,
        max_experts: int,
        control: list[int],
        data: list[int],
        data_bytes: int,
        local: int,
        fault: int,
        device: int,
        part: NormalPart = ...,
    ) -> None: ...
    def layout(
        self,
        topk_idx: int,
        idx_bytes: int,
        num_tokens: int,
        topk: int,
        num_experts: int,
        tokens_per_rank: int,
        tokens_per_expert: int,
        is_token_in_rank: int,
        stream: int,
    ) -> None: ...
    def notify(
        self,
        tokens_per_rank: int,
        tokens_per_expert: int,
        is_token_in_rank: int,
        num_tokens: int,
        num_experts: int,
        alignment: int,
        rank_prefix: int,
        send_position: int,
        recv_counts: int,
        host_counts: int,
        stream: int,
    ) -> None: ...
    def dispatch(
        self,
        x: int,
        x_stride_bytes: int,
        row_bytes: int,
        scales: int,
        scale_stride_token: int,
        scale_stride_group: int,
        num_scales: int,
        topk_idx: int,
        idx_bytes: int,
        topk_weights: int,
        topk: int,
        num_experts: int,
        send_position: int,
        rank_prefix: int,
        num_tokens: int,
        block_offset: int,
        block_rows: int,
        size: int,
        num_sms: int,
        source_token: int,
        stream: int,
    ) -> None: ...
    def combine(
        self,
        x: int,
        x_stride_bytes: int,
        hidden: int,
        topk_weights: int,
        topk: int,
        bias0: int,
        bias1: int,
        send_position: int,
        rank_prefix: int,
        num_tokens: int,
        inbox_offset: int,
        out: int,
        out_weights: int,
        num_sms: int,
        order: int,
        stream: int,
    ) -> None: ...
    def set_time_budget(self, nanoseconds: int) -> None:
        """Synchronises; not for captured code."""

    def read_state(self) -> tuple[int, int, int]:
        """Synchronises."""

    def reset(self) -> None:
        """As of HostNormal. Synchronises."""

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
