"""torch's own all-to-all over symmetric memory (`torch.ops.symm_mem.all_to_all_vdev`), as a peer.

It takes the splits from the device and reads rows out of its peers' memory, in two launches: one
exchanges splits and offsets and is the only barrier, the other fetches. Two things follow for its
user, which this adapter keeps. Calls in a row need splits of their own, because a fast rank writes
the next ones while a slow one still reads; and what a rank sent may only be written again behind a
later call, which every pair here has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.distributed as dist

from ep_runtime.bench.implementation import Implementation, Problem
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.peers import Absent, Peer
from ep_runtime.bench.peers.collective import RECV_FORMAT, Additions, Collective, WithKernels
from ep_runtime.bench.peers.collectives import load_kernels
from ep_runtime.bench.peers.exchange import AllToAll, Exchange, Memory
from ep_runtime.bench.peers.wire import Wire, slots_by_rank
from ep_runtime.bench.traffic import BF16_BYTES
from ep_runtime.errors import BuildError
from ep_runtime.memory.nvshmem import nvshmem_running

NAME = "torch-symm-a2a"
SCHEMA = ("input", "out", "in_splits", "out_splits_offsets", "group_name")
# Its blocks share out a peer's bytes evenly or stop the GPU with an assertion. It launches one for
# every 64 KiB of its input tensor, filled or not, in multiples of the ranks and at most 64. So the
# blocks of a peer are made a power of two here by the rows it is shown; rows are multiples of 128
# bytes, and ranks a power of two.
ROW_ALIGNMENT = 128
BLOCK_BYTES = 64 << 10
MOST_BLOCKS = 64

Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str], object]
Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]


def rows_to_show(least: int, row_bytes: int, num_ranks: int) -> int:
    """Rows of the input tensor, at least `least`, for which a peer has a power of two of blocks."""
    blocks = num_ranks
    while blocks < MOST_BLOCKS and least * row_bytes > blocks * BLOCK_BYTES:
        blocks *= 2
    if blocks >= MOST_BLOCKS:
        return max(least, -(-MOST_BLOCKS * BLOCK_BYTES // row_bytes))
    return max(least, blocks * BLOCK_BYTES // row_bytes)


class SymmetricAllToAll:
    """One input set's exchange. `splits` [2, 3, R] int64, symmetric: there and back; what this rank
    sends to each, what it got from each, where that begins."""

    def __init__(
        self,
        problem: Problem,
        memory: Memory,
        splits: torch.Tensor,
        index: int,
        operation: Operation,
        group_name: str,
    ) -> None:
        sizes, rank, counts = problem.sizes, problem.rank, problem.counts[index]
        sent, got = counts[rank].tolist(), counts[:, rank].tolist()
        starts = [sum(sent[:dest]) for dest in range(sizes.num_ranks)]
        self.slots = slots_by_rank(
            problem.inputs[index].topk_idx, sizes.num_ranks, problem.num_local, starts
        )
        self.send = memory.send[index][: sum(sent)]
        self.received = memory.received[: sum(got)]
        self.reduced = memory.reduced[: sum(got)]
        self.returned = memory.returned[: sum(sent)]
        self.output = torch.empty(
            sizes.tokens_of(rank), sizes.hidden, dtype=torch.bfloat16, device=problem.device
        )
        self.place: torch.Tensor | None = self.slots
        self._splits, self._operation, self._group_name = splits, operation, group_name
        self._splits.zero_()
        self._splits[0, 0] = counts[rank].to(problem.device)
        self._splits[1, 0] = counts[:, rank].to(problem.device)
        # A tensor without rows has no address, and peers' rows are found by this rank's own.
        self._num_ranks, self._most = sizes.num_ranks, sizes.num_ranks * sizes.num_tokens
        self._there = self._shown(memory.send[index], memory.received)
        self._back = self._shown(memory.reduced, memory.returned)

    def _shown(self, rows: torch.Tensor, to: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = rows_to_show(self._most, rows.stride(0) * rows.element_size(), self._num_ranks)
        return rows[:count], to[:count]

    def forward(self) -> None:
        self._run(*self._there, self._splits[0])

    def back(self) -> None:
        self._run(*self._back, self._splits[1])

    def _run(self, rows: torch.Tensor, to: torch.Tensor, splits: torch.Tensor) -> None:
        self._operation(rows, to, splits[0], splits[1:], self._group_name)


class SymmetricPeers:
    """Makes the peer, bare and with the kernels around it; buffers are kept from size to size."""

    def __init__(
        self,
        options: LowLatencyOptions,
        group: dist.ProcessGroup,
        device: torch.device,
        operation: Operation,
        allocate: Allocate,
    ) -> None:
        self._options = options
        self._group_name: str = group.group_name
        self._num_ranks = dist.get_world_size(group)
        self._device = device
        self._operation, self._allocate = operation, allocate
        self._buffers: dict[Wire, tuple[Memory, torch.Tensor]] = {}

    def peers(self, kinds: Sequence[Additions]) -> list[Peer]:
        """One for each of `kinds`."""
        return [self._peer(additions) for additions in kinds]

    def _peer(self, additions: Additions) -> Peer:
        name = f"{NAME}+{additions}" if additions else NAME
        return Peer(name, RECV_FORMAT[additions], lambda problem: self._build(problem, additions))

    def _build(self, problem: Problem, additions: Additions) -> Implementation:
        sizes = problem.sizes
        wire = Wire(sizes.hidden, sizes.topk, problem.dispatch_format, ROW_ALIGNMENT)
        if wire not in self._buffers:
            self._buffers[wire] = self._allocate_buffers(wire)
        memory, splits = self._buffers[wire]
        exchanges: list[Exchange] = [
            SymmetricAllToAll(
                problem, memory, splits[index], index, self._operation, self._group_name
            )
            for index in range(len(problem.inputs))
        ]
        traffic = AllToAll.wire_bytes(problem, wire, exact=True)
        held = self._bytes_held(wire)
        kernels: ModuleType | None = load_kernels() if self._device.type == "cuda" else None
        if additions and kernels is not None:
            return WithKernels(problem, wire, exchanges, traffic, held, kernels, additions)
        return Collective(problem, wire, exchanges, traffic, held, kernels)

    def _allocate_buffers(self, wire: Wire) -> tuple[Memory, torch.Tensor]:
        """In an order that is the same on every rank."""
        options, ranks = self._options, self._num_ranks
        most = ranks * options.buffer_tokens

        def packed() -> torch.Tensor:
            rows = rows_to_show(most, wire.row_bytes, ranks)
            buffer = self._allocate((rows, wire.row_bytes), torch.uint8)
            buffer.zero_()
            wire.views(buffer).topk_idx.fill_(-1)
            return buffer

        def bf16() -> torch.Tensor:
            rows = rows_to_show(most, wire.hidden * BF16_BYTES, ranks)
            buffer = self._allocate((rows, wire.hidden), torch.bfloat16)
            return buffer.zero_()

        output = torch.empty(0, wire.hidden, dtype=torch.bfloat16, device=self._device)
        send = [packed() for _ in range(options.input_sets)]
        memory = Memory(send, packed(), bf16(), bf16(), output)
        return memory, self._allocate((options.input_sets, 2, 3, ranks), torch.int64)

    def _bytes_held(self, wire: Wire) -> int:
        """Of the buffers that one exchange reads and writes, and its output, at max_tokens."""
        tokens, ranks = self._options.buffer_tokens, self._num_ranks
        there, back = 2 * tokens * ranks * wire.row_bytes, 2 * tokens * ranks + tokens
        return there + back * BF16_BYTES * wire.hidden


def find_symmetric(
    options: LowLatencyOptions, group: dist.ProcessGroup, device: torch.device
) -> tuple[list[Peer], list[Absent]]:
    """The peer where torch has it, else why not."""
    problem = _missing(device, dist.get_world_size(group))
    if problem:
        return [], [Absent(NAME, problem)]
    symmetric = importlib.import_module("torch.distributed._symmetric_memory")
    try:
        symmetric.set_backend("NVSHMEM")
    except RuntimeError as error:
        return [], [Absent(NAME, f"torch cannot use NVSHMEM: {error}")]

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = symmetric.empty(shape, dtype=dtype, device=device)
        symmetric.rendezvous(tensor, group)
        return tensor

    maker = SymmetricPeers(options, group, device, torch.ops.symm_mem.all_to_all_vdev, allocate)
    try:
        load_kernels()
    except BuildError as error:
        return [], [Absent(NAME, f"{error}: its rows are added by a kernel of Triton's")]
    return maker.peers(("", "quantise", "kernels")), []


def _missing(device: torch.device, num_ranks: int) -> str:
    """Why the operation cannot be used here, or ""."""
    if device.type != "cuda":
        return "it needs GPUs"
    if num_ranks & (num_ranks - 1):
        return f"it shares out bytes evenly, which {num_ranks} ranks do not allow; a power of two"
    if nvshmem_running():
        return "NVSHMEM runs in this process for our own heap; set EP_MEMORY=ipc to measure both"
    try:
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        schema = torch.ops.symm_mem.all_to_all_vdev.default._schema
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"this torch ({torch.__version__}) has no all_to_all_vdev: {error}"
    if tuple(argument.name for argument in schema.arguments) != SCHEMA:
        return f"this torch ({torch.__version__}) has another all_to_all_vdev: {schema}"
    if not symmetric.is_nvshmem_available():
        return "torch finds no libnvshmem_host.so.3; install nvidia-nvshmem-cu13"
    return ""
