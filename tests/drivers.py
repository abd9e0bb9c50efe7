"""Beside one rank's Buffer in a test: CPU tensors in, poisoned outputs, CPU tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from support import Snapshot, poison

from ep_runtime import Buffer
from ep_runtime.pending import Pending
from ep_runtime.reference import RankInput


class Driver:
    """One rank: moves inputs to its device, poisons outputs, copies results back."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.pending: dict[int, Pending[Any]] = {}
        self.handles: dict[int, Any] = {}
        self.captured: CapturedPair
        self.fused: Any = None

    def _on_device(self, rank_input: RankInput, expected: int | None) -> tuple[Any, Any]:
        device = self.buffer.device
        n = rank_input.num_tokens
        scalar = None if n is None else torch.tensor(n, dtype=torch.int32, device=device)
        tensors = (rank_input.x, rank_input.topk_idx, rank_input.topk_weights)
        options = {"num_tokens": scalar, "expected_tokens": expected}
        return [t.to(device) for t in tensors], options

    def _poison_inbox(self, chain: int) -> None:
        received = self.buffer._inboxes[chain].received
        for field in fields(Snapshot):
            poison(getattr(received, field.name))

    def _snapshot(self, received: Any) -> Snapshot:
        values = [getattr(received, field.name) for field in fields(Snapshot)]
        return Snapshot(*[None if v is None else v.cpu().clone() for v in values])

    def _strided(self, rows: torch.Tensor, extra: int) -> torch.Tensor:
        """The same rows, `extra` channels of NaN between them."""
        wide = torch.full(
            (*rows.shape[:-1], rows.shape[-1] + extra), float("nan"), dtype=rows.dtype
        ).to(self.buffer.device)
        wide[..., : rows.shape[-1]] = rows.to(self.buffer.device)
        return wide[..., : rows.shape[-1]]

    def dispatch(
        self,
        rank_input: RankInput,
        chain: int = 0,
        expected: int | None = None,
        extra_stride: int = 0,
    ) -> None:
        (x, idx, weights), options = self._on_device(rank_input, expected)
        if extra_stride:
            x = self._strided(rank_input.x, extra_stride)
        self._poison_inbox(chain)
        self.pending[chain] = self.buffer.dispatch(x, idx, weights, chain=chain, **options)

    def receive(self, chain: int = 0) -> Snapshot:
        received = self.pending.pop(chain).wait()
        self.handles[chain] = received.handle
        return self._snapshot(received)

    def receive_alone(self, chain: int = 0) -> None:
        """Receive although neighbours may not have sent, then raise what came of it."""
        order, self.buffer._order = self.buffer._order, None
        try:
            self.receive(chain)
            self.check()
        finally:
            self.buffer._order = order

    def check(self) -> None:
        """Raise what the device has recorded by now."""
        self.buffer._ops.synchronize()
        self.buffer.check()

    def combine(self, y: torch.Tensor, chain: int = 0, extra_stride: int = 0) -> None:
        handle = self.handles[chain]
        on_device = self._strided(y, extra_stride) if extra_stride else y.to(self.buffer.device)
        self.pending[chain] = self.buffer.combine(on_device, handle, out=self._out(handle))

    def collect(self, chain: int = 0) -> torch.Tensor:
        out: torch.Tensor = self.pending.pop(chain).wait()
        return out.cpu().clone()

    def _out(self, handle: Any) -> torch.Tensor:
        shape = (handle.num_rows, self.buffer.config.hidden)
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.buffer.device)
        poison(out)
        return out

    def dispatch_fused(self, rank_input: RankInput, chain: int = 0) -> None:
        """Launched only: a peer of this process may have to launch its own first."""
        (x, idx, weights), options = self._on_device(rank_input, None)
        self._poison_inbox(chain)
        self.fused = self.buffer.dispatch_fused(x, idx, weights, chain=chain, **options)
        self.handles[chain] = self.fused.handle

    def combine_fused(self, y: torch.Tensor, chain: int = 0) -> None:
        handle = self.handles[chain]
        on_device = y.to(self.buffer.device)
        self.fused = self.buffer.combine_fused(on_device, handle, out=self._out(handle))

    def fused_result(self) -> Snapshot | torch.Tensor:
        """What the last fused operation gave."""
        if isinstance(self.fused, torch.Tensor):
            return self.fused.cpu().clone()
        return self._snapshot(self.fused)

    def query(self, name: str, *arguments: Any) -> Any:
        """An attribute of the Buffer, called if it is a method."""
        value = getattr(self.buffer, name)
        return value(*arguments) if callable(value) else value

    def reset_alone(self) -> None:
        """Lose this rank's state without telling the others."""
        self.buffer._ops.native.reset()

    def use_gpu(self) -> float:
        """Ordinary work of torch: raises where the context is lost."""
        return float(torch.ones(100, device=self.buffer.device).sum())

    def capture(self, rows: int, chain: int) -> None:
        self.captured = CapturedPair([self], rows, chain)

    def replay(self, rank_input: RankInput, y: torch.Tensor) -> tuple[Snapshot, torch.Tensor]:
        self.captured.load(0, rank_input, y)
        self.captured.graph.replay()
        return self.captured.results(0)


class CapturedPair:
    """A graph of one dispatch and combine of ranks that share a GPU, over static tensors.

    own_streams: every rank's operations on a stream of its own, forked from the captured one.
    """

    def __init__(
        self, drivers: list[Driver], rows: int, chain: int, *, own_streams: bool = False
    ) -> None:
        self.drivers, self.chain, self.rows = drivers, chain, rows
        device = drivers[0].buffer.device
        with torch.cuda.device(device):
            self.static = [self._static(driver.buffer) for driver in drivers]
            self.received: list[Any] = []
            self.graph = torch.cuda.CUDAGraph()
            streams = [torch.cuda.Stream() for _ in drivers] if own_streams else None
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self._record(streams)

    def _static(self, buffer: Buffer) -> dict[str, torch.Tensor]:
        config, device = buffer.config, buffer.device
        shape = (self.rows, config.hidden)
        table = (self.rows, config.topk)
        y = buffer._inboxes[self.chain].received.x
        return {
            "x": torch.zeros(shape, dtype=torch.bfloat16, device=device),
            "idx": torch.full(table, -1, dtype=torch.int64, device=device),
            "weights": torch.zeros(table, device=device),
            "real": torch.zeros((), dtype=torch.int32, device=device),
            "y": torch.zeros(y.shape, dtype=torch.bfloat16, device=device),
            "out": torch.zeros(shape, dtype=torch.bfloat16, device=device),
        }

    def _record(self, streams: list[torch.cuda.Stream] | None) -> None:
        main = torch.cuda.current_stream()

        def each(step: Callable[[Buffer, dict[str, torch.Tensor], int], Any]) -> list[Any]:
            results = []
            for i, (driver, static) in enumerate(zip(self.drivers, self.static, strict=True)):
                with torch.cuda.stream(streams[i] if streams else main):
                    results.append(step(driver.buffer, static, i))
            return results

        for stream in streams or ():
            stream.wait_stream(main)
        sent = each(
            lambda b, s, _: b.dispatch(
                s["x"], s["idx"], s["weights"], chain=self.chain, num_tokens=s["real"]
            )
        )
        self.received = each(lambda _b, _s, i: sent[i].wait())
        back = each(lambda b, s, i: b.combine(s["y"], self.received[i].handle, out=s["out"]))
        each(lambda _b, _s, i: back[i].wait())
        for stream in streams or ():
            main.wait_stream(stream)

    def load(self, index: int, rank_input: RankInput, y: torch.Tensor) -> None:
        """Fill rank `index`'s static inputs: its rows are the first real ones."""
        static, real = self.static[index], rank_input.num_real
        self.drivers[index]._poison_inbox(self.chain)
        poison(static["out"])
        static["x"][:real] = rank_input.x[:real].to(static["x"].device)
        static["idx"][:real] = rank_input.topk_idx[:real].to(static["x"].device)
        static["weights"][:real] = rank_input.topk_weights[:real].to(static["x"].device)
        static["real"].fill_(real)
        static["y"].copy_(y)

    def results(self, index: int) -> tuple[Snapshot, torch.Tensor]:
        """What rank `index` received, and its combined rows of the last load()."""
        driver, static = self.drivers[index], self.static[index]
        driver.check()
        real = int(static["real"])
        return driver._snapshot(self.received[index]), static["out"][:real].cpu().clone()
