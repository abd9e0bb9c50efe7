"""The collective part: every rank warms up and captures before any rank replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ep_runtime.buffer import Buffer
from ep_runtime.errors import CaptureError
from ep_runtime.graphs.capture import CaptureSite, CudaGraph
from ep_runtime.graphs.modes import Tensors
from ep_runtime.graphs.record import HostGraph

Sizes = tuple[int, ...]  # a bucket per rank of this process


@dataclass(frozen=True, slots=True)
class GraphReport:
    """Facts about one graph.

    sizes: the bucket of each rank of this process. nodes: by kind (host: operations by kind).
    static_bytes: its inputs and outputs; inputs are shared with the other buckets.
    """

    sizes: Sizes
    nodes: Mapping[str, int]
    launches: int
    static_bytes: int
    replays: int


@dataclass(slots=True)
class Entry:
    """One graph: the step bound to the static inputs of its buckets, and what became of it."""

    sizes: Sizes
    run: Callable[[], list[Tensors]]
    captured: HostGraph | CudaGraph | None = None
    replays: int = 0

    @property
    def graph(self) -> HostGraph | CudaGraph:
        if self.captured is None:
            raise CaptureError(f"the buckets {self.sizes} have no graph: their capture did not end")
        return self.captured

    def report(self, input_bytes: int) -> GraphReport:
        audit, outputs = self.graph.audit, self.graph.outputs
        results = sum(t.numel() * t.element_size() for rank in outputs for t in rank.values())
        return GraphReport(
            self.sizes, audit.counts, audit.launches, input_bytes + results, self.replays
        )


class Builder:
    """Captures entries on all ranks of a group together. `site` is None on the host backend."""

    def __init__(self, buffers: Sequence[Buffer], site: CaptureSite | None) -> None:
        self._buffers = buffers
        self._site = site
        self._virtual = buffers[0].virtual
        self._world = buffers[0].world

    def build(self, entries: Sequence[Entry], warmup: int) -> None:
        """Warm up, capture, instantiate and upload every entry."""
        self._require_same_runs(len(entries), warmup)
        with ExitStack() as stack:
            for buffer in self._buffers:
                stack.enter_context(buffer.patient())
            # Ranks meet at its end: one that still loads a kernel could wait for one that replays.
            self._together("warming up", lambda: self._warm_all(entries, warmup))
            self._together("capturing", lambda: self._capture_all(entries))

    def _require_same_runs(self, graphs: int, warmup: int) -> None:
        """Warm-up runs are collective: every rank must make as many, whatever its buckets are."""
        if self._virtual:
            return
        mine = f"{graphs} graphs with {warmup} warm-up runs each"
        for rank, answer in enumerate(self._world.all_gather(mine.encode())):
            if answer.decode() != mine:
                raise CaptureError(
                    f"rank {self._world.rank} captures {mine}, rank {rank} {answer.decode()}; give "
                    "every rank as many buckets and the same warmup"
                )

    def _warm_all(self, entries: Sequence[Entry], warmup: int) -> None:
        for entry in entries:
            for _ in range(warmup):
                self._warm(entry)
        self._synchronize()
        self._check()

    def _warm(self, entry: Entry) -> None:
        if self._site is None:
            entry.run()
            return
        with self._site.on_stream():
            entry.run()
        self._check()

    def _check(self) -> None:
        for buffer in self._buffers:
            buffer.check()

    def _capture_all(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.captured = self._capture(entry)
        self._synchronize()

    def _capture(self, entry: Entry) -> HostGraph | CudaGraph:
        if self._site is not None:
            return CudaGraph(self._buffers, entry.run, self._site, f"the graph of {entry.sizes}")
        return HostGraph(self._buffers, entry.run)

    def _together(self, what: str, part: Callable[[], None]) -> None:
        """Do a part; where it fails on one rank, it fails on all. Ranks meet at its end."""
        if self._virtual:
            part()
        else:
            self._world.agree(what, part)

    def _synchronize(self) -> None:
        if self._site is not None:
            self._site.synchronize()
