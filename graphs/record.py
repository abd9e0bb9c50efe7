"""Which operations a step issues, and the host backend's graph: that list and the step itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ep_runtime.buffer import Buffer
from ep_runtime.errors import CaptureError
from ep_runtime.graphs.audit import Region, audit_operations
from ep_runtime.graphs.modes import Tensors, plain_copy
from ep_runtime.rank import OpRecord


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on one rank's buffer. kind: "dispatch_send", "dispatch_recv" and so on."""

    kind: str
    chain: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} chain {self.chain} rank {self.rank}"


@contextmanager
def recording(
    buffers: Sequence[Buffer], expected: Sequence[Operation] | None = None
) -> Iterator[list[Operation]]:
    """Write down every operation on these buffers, in order of issue over all of them.

    With `expected`, an operation that differs raises CaptureError before it reaches a peer.
    """
    operations: list[Operation] = []

    def recorder(rank: int) -> Callable[[OpRecord], None]:
        def write_down(record: OpRecord) -> None:
            operation = Operation(record.kind, record.chain, rank)
            if expected is not None:
                _compare(expected, len(operations), operation)
            operations.append(operation)

        return write_down

    previous = [buffer.recorder for buffer in buffers]
    for buffer in buffers:
        buffer.recorder = recorder(buffer.rank)
    try:
        yield operations
    finally:
        for buffer, before in zip(buffers, previous, strict=True):
            buffer.recorder = before


def reset_regions(buffers: Sequence[Buffer], operations: Sequence[Operation]) -> list[Region]:
    """The step statistics of every (rank, chain) that the operations use."""
    used = dict.fromkeys((operation.rank, operation.chain) for operation in operations)
    by_rank = {buffer.rank: buffer for buffer in buffers}
    return [
        Region(
            *by_rank[rank].stats_region(chain),
            device=by_rank[rank].device.index or 0,
            label=f"statistics of rank {rank} chain {chain}",
        )
        for rank, chain in used
    ]


def shared_regions(buffers: Sequence[Buffer]) -> list[Region]:
    """Memory of these ranks that peers write, and of the peers that these ranks do."""
    return [
        Region(*region, device=buffer.device.index or 0, label=f"the heap of rank {rank}")
        for buffer in buffers
        for rank, region in enumerate(buffer.heap_regions())
    ]


class HostGraph:
    """A step recorded on the host backend: replayed by running it, held to what was recorded.

    As in a CUDA graph, a replay first zeroes the statistics of the chains in use.
    """

    def __init__(self, buffers: Sequence[Buffer], run: Callable[[], list[Tensors]]) -> None:
        self._buffers = buffers
        self._run = run
        with recording(buffers) as operations:
            outputs = run()
        self._operations = tuple(operations)
        self._resets = reset_regions(buffers, operations)
        self.audit = audit_operations([str(operation) for operation in operations], self._resets)
        # A replay writes where the first run wrote, as a CUDA graph does.
        self.outputs = [{name: plain_copy(t) for name, t in rank.items()} for rank in outputs]

    def replay(self) -> None:
        """Run the step again. Raises CaptureError if it issues other operations than before."""
        for region in self._resets:
            ctypes.memset(region.address, 0, region.num_bytes)
        with recording(self._buffers, self._operations) as operations:
            outputs = self._run()
        if len(operations) < len(self._operations):
            _compare(self._operations, len(operations), None)
        with torch.inference_mode():  # copies that autograd would record live for ever
            for static, fresh in zip(self.outputs, outputs, strict=True):
                _copy(static, fresh)


def _compare(recorded: Sequence[Operation], at: int, issued: Operation | None) -> None:
    """Raise CaptureError unless operation `at` (None: the step's end) is the recorded one."""
    wanted = recorded[at] if at < len(recorded) else None
    if issued != wanted:
        raise CaptureError(
            f"replay came to {issued or 'the end'} at operation {at}, recorded was "
            f"{wanted or 'the end'}; a step's sequence may depend on the bucket only: take the "
            "branch out of the step, or capture again"
        )


def _copy(static: Tensors, fresh: Tensors) -> None:
    if static.keys() != fresh.keys():
        raise CaptureError(
            f"the step returned {sorted(fresh)}, it was captured with {sorted(static)}; return the "
            "same outputs every time"
        )
    for name, tensor in fresh.items():
        if tensor.shape != static[name].shape:
            raise CaptureError(
                f"output {name!r} has shape {list(tensor.shape)}, it was captured with "
                f"{list(static[name].shape)}; shapes may depend on the bucket only"
            )
        static[name].copy_(tensor)
