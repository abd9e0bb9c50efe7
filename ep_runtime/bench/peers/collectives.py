"""The collective peers of a process group: all-gather + reduce-scatter, and all-to-all."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ep_runtime.bench.implementation import Implementation, Problem
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.peers import Absent, Peer
from ep_runtime.bench.peers.collective import RECV_FORMAT, Additions, Collective, WithKernels
from ep_runtime.bench.peers.exchange import AllGather, AllToAll, Exchange, Memory
from ep_runtime.bench.peers.wire import Wire
from ep_runtime.bench.traffic import BF16_BYTES, Traffic
from ep_runtime.errors import BuildError


def load_kernels() -> ModuleType:
    """The Triton kernels that surround a collective. Raises BuildError without Triton."""
    try:
        return importlib.import_module("ep_runtime.bench.peers.triton_kernels")
    except ImportError as error:
        raise BuildError(f"Triton is not installed ({error}); install triton") from error


class Collectives:
    """Makes the peers of one process group; buffers are kept from size to size.

    Named after the group's backend: "nccl-ag-rs" on GPUs, "gloo-ag-rs" on CPU ranks.
    """

    def __init__(
        self, options: LowLatencyOptions, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._options = options
        self._group = group
        self._device = device
        self._backend = dist.get_backend(group)
        self._num_ranks = dist.get_world_size(group)
        self._memory: dict[tuple[Wire, bool], Memory] = {}
        self._pools: list[torch.cuda.MemPool] = []

    def find(self) -> tuple[list[Peer], list[Absent]]:
        """What there is to measure here."""
        peers: list[Peer] = []
        absent: list[Absent] = []
        problem = self._kernel_problem()
        for kind in ("ag-rs", "a2a", "a2a-equal", "ag-rs-symm"):
            if not self._options.wants(f"nccl-{kind}"):
                continue
            name = f"{self._backend}-{kind}"
            if kind == "ag-rs-symm" and self._device.type != "cuda":
                absent.append(Absent(name, "symmetric memory needs NCCL and GPUs"))
                continue
            peers.append(self._peer(name, kind, ""))
            if problem:
                absent.append(Absent(f"{name}+kernels", problem))
                continue
            peers += [self._peer(name, kind, additions) for additions in ("quantise", "kernels")]
        return peers, absent

    def _kernel_problem(self) -> str:
        """Why the kernels around a collective cannot run here, or ""."""
        if self._device.type != "cuda":
            return "its kernels are Triton's: GPUs only"
        try:
            load_kernels()
        except BuildError as error:
            return str(error)
        return ""

    def _peer(self, name: str, kind: str, additions: Additions) -> Peer:
        full_name = f"{name}+{additions}" if additions else name
        return Peer(
            full_name,
            RECV_FORMAT[additions],
            lambda problem: self._build(problem, kind, additions),
        )

    def _build(self, problem: Problem, kind: str, additions: Additions) -> Implementation:
        sizes = problem.sizes
        wire = Wire(sizes.hidden, sizes.topk, problem.dispatch_format)
        memory = self._buffers(wire, symmetric=kind.endswith("symm"))
        exchanges: list[Exchange] = []
        for index in range(len(problem.inputs)):
            if kind.startswith("ag-rs"):
                exchanges.append(AllGather(problem, memory, index, self._group))
            else:
                exact = kind == "a2a"
                exchanges.append(AllToAll(problem, memory, index, self._group, exact=exact))
        traffic, held = self._traffic(problem, wire, kind), self._bytes_held(wire, kind)
        kernels = load_kernels() if additions or self._needs_sum_kernel(kind) else None
        if additions and kernels is not None:
            return WithKernels(problem, wire, exchanges, traffic, held, kernels, additions)
        return Collective(problem, wire, exchanges, traffic, held, kernels)

    def _needs_sum_kernel(self, kind: str) -> bool:
        return self._device.type == "cuda" and kind.startswith("a2a")

    @staticmethod
    def _traffic(problem: Problem, wire: Wire, kind: str) -> Traffic:
        if kind.startswith("ag-rs"):
            return AllGather.wire_bytes(problem, wire)
        return AllToAll.wire_bytes(problem, wire, exact=kind == "a2a")

    def _bytes_held(self, wire: Wire, kind: str) -> int:
        """Of the buffers that the collectives read and write, at max_tokens."""
        tokens, ranks = self._options.buffer_tokens, self._num_ranks
        bf16_row = BF16_BYTES * wire.hidden
        sent = tokens if kind.startswith("ag-rs") else tokens * ranks
        received = tokens * ranks
        returned = 0 if kind.startswith("ag-rs") else tokens * ranks
        return (sent + received) * wire.row_bytes + (received + returned + tokens) * bf16_row

    def _buffers(self, wire: Wire, *, symmetric: bool) -> Memory:
        key = (wire, symmetric)
        if key not in self._memory:
            self._memory[key] = self._symmetric(wire) if symmetric else self._plain(wire)
        return self._memory[key]

    def _plain(self, wire: Wire) -> Memory:
        options = self._options
        return Memory.allocate(
            wire, self._num_ranks, options.buffer_tokens, options.input_sets, self._device
        )

    def _symmetric(self, wire: Wire) -> Memory:
        """Buffers in a pool of NCCL's allocator, registered as windows on every rank at once."""
        backend = self._nccl()
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            memory = self._plain(wire)
        torch.cuda.synchronize()
        backend.register_mem_pool(pool, symm=True)
        self._pools.append(pool)  # a pool that goes away takes its registration with it
        return memory

    def _nccl(self) -> Any:
        """torch's ProcessGroupNCCL, whose allocator and windows have no public name."""
        return self._group._get_backend(self._device)

    def close(self) -> None:
        """Take the windows back; collective. No graph may use the buffers any more."""
        for pool in self._pools:
            self._nccl().deregister_mem_pool(pool)
        self._memory.clear()
        self._pools.clear()
