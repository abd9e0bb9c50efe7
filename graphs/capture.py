"""A step as one CUDA graph: capture, reset nodes, audit, instantiation, upload."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from ep_runtime.buffer import Buffer
from ep_runtime.graphs import driver
from ep_runtime.graphs import nodes as gn
from ep_runtime.graphs.audit import Audit, audit_graph
from ep_runtime.graphs.modes import Tensors
from ep_runtime.graphs.record import Operation, recording, reset_regions, shared_regions


def _pool_on(device: torch.device) -> torch.cuda.MemPool:
    """A pool belongs to the device that is current when it is made."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


class CaptureSite:
    """What all graphs of one DecodeGraphs share: devices, capture stream, memory pools."""

    def __init__(self, devices: Sequence[torch.device], pool: Any) -> None:
        self.devices = list(dict.fromkeys(devices))
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        make_stream: Any = torch.cuda.Stream  # torch leaves it untyped
        self.stream: torch.cuda.Stream = make_stream(self.devices[0])
        others = self.devices[1:]
        self._side: list[torch.cuda.Stream] = [make_stream(device) for device in others]
        # A capture's own pool serves its first device only.
        self._side_pools = [_pool_on(device) for device in others]

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work eagerly on the capture stream, after all earlier and before all later work."""
        self.synchronize()
        with torch.cuda.stream(self.stream):
            yield
        self.synchronize()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """During a capture: give every other device a stream of its own, joined at the end."""
        with ExitStack() as stack:
            for stream, pool, device in zip(
                self._side, self._side_pools, self.devices[1:], strict=True
            ):
                stream.wait_stream(self.stream)
                stack.enter_context(torch.cuda.use_mem_pool(pool, device))
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.cuda.stream(self.stream))
            yield
            for stream in self._side:
                self.stream.wait_stream(stream)

    def leave_pool(self) -> None:
        """After a capture that could not end: let torch's allocator forget it, which else gives no
        memory back that another stream has used. (That of pinned memory cannot be told: it refuses
        to record to this pool again. Another pool can be captured to.)
        """
        device = self.stream.device_index
        with suppress(RuntimeError):  # raised where torch has done so itself
            torch._C._cuda_endAllocateToPool(device, self.pool)

    def join_before(self) -> None:
        """Let the launching stream wait for the inputs that other devices are still copying."""
        launching = torch.cuda.current_stream(self.devices[0])
        for device in self.devices[1:]:
            launching.wait_stream(torch.cuda.current_stream(device))

    def join_after(self) -> None:
        """Let the other devices' streams wait for the graph."""
        launching = torch.cuda.current_stream(self.devices[0])
        for device in self.devices[1:]:
            torch.cuda.current_stream(device).wait_stream(launching)

    def synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: a graph that it frees would invalidate the capture of this one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# torch's allocators point to a graph for as long as they route to its pool: past a failed capture.
_failed: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, site: CaptureSite) -> Iterator[None]:
    """Capture on the site's stream. What is raised inside comes through, whatever became of the
    capture, whose own error is then its context; the current stream is what it was in any case.

    torch.cuda.graph leaves its stream current where the capture cannot begin or end (an `.item()`
    inside breaks it), raises that in place of what was raised inside, and keeps the pool occupied.
    """
    capture = torch.cuda.graph(
        graph, pool=site.pool, stream=site.stream, capture_error_mode="thread_local"
    )
    began = False
    inside: BaseException | None = None
    with torch.cuda.stream(site.stream):
        try:
            with capture:
                began = True
                try:
                    yield
                except BaseException as error:
                    inside = error
                    raise
        except BaseException as error:
            if error is inside:
                raise
            if began:
                _failed.append(graph)
                site.leave_pool()
            if inside is None:
                raise
            error.__context__ = inside.__context__
            raise inside  # noqa: B904 - its context is the capture's error, its cause its own


class CudaGraph:
    """A captured, audited, instantiated and uploaded step of all ranks of this process."""

    def __init__(
        self,
        buffers: Sequence[Buffer],
        run: Callable[[], list[Tensors]],
        site: CaptureSite,
        what: str,
    ) -> None:
        self._site = site
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        capture = _capturing(self._graph, site)
        with _no_collection(), recording(buffers) as operations, capture, site.fork():
            self.outputs = run()
        self.audit = self._add_resets(buffers, operations)
        self.audit.require_clean(what)
        self._graph.instantiate()
        driver.upload(self._graph.raw_cuda_graph_exec(), site.stream.cuda_stream)

    def replay(self) -> None:
        """Launch on the current stream of the first device."""
        self._site.join_before()
        self._graph.replay()
        self._site.join_after()

    def _add_resets(self, buffers: Sequence[Buffer], operations: Sequence[Operation]) -> Audit:
        """Add a reset node per rank and chain in use, then read the graph back and judge it."""
        handle = driver.graph_handle(self._graph.raw_cuda_graph())
        captured = driver.read_graph(handle)
        resets = reset_regions(buffers, operations)
        level = driver.list_nodes(handle)
        before = [level[index] for index in gn.reset_anchors(captured.nodes, captured.edges)]
        for region in resets:
            driver.add_reset(handle, before, region.address, region.num_bytes, region.device)
        return audit_graph(
            driver.read_graph(handle),
            resets=resets,
            shared=shared_regions(buffers),
            operations=[str(operation) for operation in operations],
        )
