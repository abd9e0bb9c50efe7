"""Beside one rank's Buffer in a test: CPU tensors in, poisoned outputs, CPU tensors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from support import Snapshot, poison

from ep_runtime import Buffer
from ep_runtime.pending import Pending
from ep_runtime.receive import ReceiveBuffer
from ep_runtime.reference import RankInput


@dataclass(frozen=True)
class Options:
    """How a dispatch is called, besides its inputs.

    into         the receive tensors of that name (see Driver.open_receive); None: the chain's own
    late         the weights come with the combines
    round_scale  as dispatch() takes it
    counting     add to the driver's cumulative_recv_count
    timing       add to the driver's wait_ns, in combines of the handle as well
    scale_order  how opaque scales lie: "rows", "columns" or "gaps" (every second word)
    combine_format  of combines of the handle, as combine() takes it
    """

    into: str | None = None
    late: bool = False
    round_scale: bool | None = None
    counting: bool = False
    timing: bool = False
    scale_order: str = "rows"
    combine_format: str | None = None


PLAIN = Options()


class Driver:
    """One rank: moves inputs to its device, poisons outputs, copies results back.

    Handles are kept by the name of their receive tensors, or by the number of their chain.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.pending: dict[tuple[str, int], Pending[Any]] = {}
        self.handles: dict[str | int, Any] = {}
        self.receives: dict[str, ReceiveBuffer] = {}
        self.captured: CapturedPair
        self.fused: Any = None
        experts, device = buffer.config.local_experts(buffer.num_ranks), buffer.device
        self.cumulative = torch.zeros(experts, dtype=torch.int32, device=device)
        self.waited = {
            op: torch.zeros(buffer.num_ranks, dtype=torch.int64, device=device)
            for op in ("dispatch", "combine")
        }
        self._timed: set[str | int] = set()
        self._combine_formats: dict[str | int, str | None] = {}
        self._keys: dict[int, str | int] = {}

    def open_receive(self, name: str, options: dict[str, Any]) -> tuple[Any, ...] | None:
        """Receive tensors of that name, whose routing looks as if it held rows; returns the
        strides of their scales."""
        self.receives[name] = self.buffer.new_receive(**options)
        received = self.receives[name].received
        received.handle.routing.fill_(0x2B)
        scales = received.scales
        return None if scales is None else (tuple(scales.shape), scales.stride())

    def open_receive_once(self, name: str) -> None:
        """Receive tensors of that name in the configuration's format, unless there are some."""
        if name not in self.receives:
            self.open_receive(name, {})

    def remember(self, key: str | int, name: str) -> None:
        """Keep a handle under another name as well."""
        self.handles[name] = self.handles[key]

    def _on_device(self, rank_input: RankInput, expected: int | None) -> tuple[Any, Any]:
        device = self.buffer.device
        n = rank_input.num_tokens
        scalar = None if n is None else torch.tensor(n, dtype=torch.int32, device=device)
        tensors = (rank_input.x, rank_input.topk_idx, rank_input.topk_weights)
        options = {"num_tokens": scalar, "expected_tokens": expected}
        return [t.to(device) for t in tensors], options

    def _called(self, rank_input: RankInput, options: Options) -> dict[str, Any]:
        """Arguments of dispatch() that `options` asks for."""
        given: dict[str, Any] = {"round_scale": options.round_scale}
        if rank_input.scales is not None:
            given["scales"] = _laid_out(rank_input.scales, options.scale_order, self.buffer.device)
        if options.into is not None:
            given["out"] = self.receives[options.into]
        if options.counting:
            given["cumulative_recv_count"] = self.cumulative
        if options.timing:
            given["wait_ns"] = self.waited["dispatch"]
        return given

    def _poison_inbox(self, chain: int, into: str | None = None) -> None:
        inbox = self.buffer._inboxes[chain] if into is None else self.receives[into]
        for field in fields(Snapshot):
            as_bytes = field.name in ("scales", "source_token")
            poison(getattr(inbox.received, field.name), as_bytes=as_bytes)

    def _snapshot(self, received: Any) -> Snapshot:
        values = [getattr(received, field.name) for field in fields(Snapshot)]
        return Snapshot(*[None if v is None else v.cpu().clone() for v in values])

    def _strided(self, rows: torch.Tensor, extra: int) -> torch.Tensor:
        """The same rows, `extra` channels of NaN between them."""
        wide = torch.empty((*rows.shape[:-1], rows.shape[-1] + extra), dtype=rows.dtype)
        poison(wide)
        wide = wide.to(self.buffer.device)
        wide[..., : rows.shape[-1]] = rows.to(self.buffer.device)
        return wide[..., : rows.shape[-1]]

    def dispatch(
        self,
        rank_input: RankInput,
        chain: int = 0,
        expected: int | None = None,
        extra_stride: int = 0,
        options: Options = PLAIN,
    ) -> None:
        (x, idx, weights), sizes = self._on_device(rank_input, expected)
        if extra_stride:
            x = self._strided(rank_input.x, extra_stride)
        self._poison_inbox(chain, options.into)
        called = self._called(rank_input, options)
        self.pending["dispatch", chain] = self.buffer.dispatch(
            x, idx, None if options.late else weights, chain=chain, **sizes, **called
        )
        self._keys[chain] = key = chain if options.into is None else options.into
        (self._timed.add if options.timing else self._timed.discard)(key)
        self._combine_formats[key] = options.combine_format

    def receive(self, chain: int = 0) -> Snapshot:
        received = self.pending.pop(("dispatch", chain)).wait()
        self.handles[self._keys[chain]] = received.handle
        return self._snapshot(received)

    def receive_alone(self, chain: int = 0) -> None:
        """Receive although neighbours may not have sent, then raise what came of it."""
        with self._without_order():
            self.receive(chain)
            self.check()

    def combine_unreceived(self, chain: int = 0) -> None:
        """Receive although neighbours may not have sent, and combine before anybody has looked at
        what came of it; then raise that."""
        with self._without_order():
            received = self.pending.pop(("dispatch", chain)).wait()
            shape = (*received.x.shape[:-1], self.buffer.config.hidden)
            y = torch.zeros(shape, dtype=torch.bfloat16, device=self.buffer.device)
            self.buffer.combine(y, received.handle).wait()
        self.check()

    @contextmanager
    def _without_order(self) -> Iterator[None]:
        """Nothing refuses a receive whose neighbours on the same device have not sent."""
        order, self.buffer._order = self.buffer._order, None
        try:
            yield
        finally:
            self.buffer._order = order

    def check(self) -> None:
        """Raise what the device has recorded by now."""
        self.buffer._ops.synchronize()
        self.buffer.check()

    def combine(
        self,
        y: torch.Tensor,
        key: str | int = 0,
        extra_stride: int = 0,
        weights: torch.Tensor | None = None,
    ) -> None:
        """key: of the handle."""
        handle = self.handles[key]
        on_device = self._strided(y, extra_stride) if extra_stride else y.to(self.buffer.device)
        self.pending["combine", handle.chain] = self.buffer.combine(
            on_device,
            handle,
            topk_weights=None if weights is None else weights.to(self.buffer.device),
            out=self._out(handle),
            wait_ns=self.waited["combine"] if key in self._timed else None,
            combine_format=self._combine_formats.get(key),  # type: ignore[arg-type]
        )

    def collect(self, chain: int = 0) -> torch.Tensor:
        out: torch.Tensor = self.pending.pop(("combine", chain)).wait()
        return out.cpu().clone()

    def tallies(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """cumulative_recv_count, and wait_ns of dispatches and of combines."""
        waited = self.waited
        tallies = (self.cumulative, waited["dispatch"], waited["combine"])
        return tuple(tally.cpu().clone() for tally in tallies)  # type: ignore[return-value]

    def _out(self, handle: Any) -> torch.Tensor:
        shape = (handle.num_rows, self.buffer.config.hidden)
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.buffer.device)
        poison(out)
        return out

    def dispatch_fused(
        self, rank_input: RankInput, chain: int = 0, options: Options = PLAIN
    ) -> None:
        """Launched only: a peer of this process may have to launch its own first."""
        (x, idx, weights), sizes = self._on_device(rank_input, None)
        self._poison_inbox(chain, options.into)
        self.fused = self.buffer.dispatch_fused(
            x,
            idx,
            None if options.late else weights,
            chain=chain,
            **sizes,
            **self._called(rank_input, options),
        )
        key = chain if options.into is None else options.into
        self.handles[key] = self.fused.handle
        self._combine_formats[key] = options.combine_format

    def combine_fused(
        self, y: torch.Tensor, key: str | int = 0, weights: torch.Tensor | None = None
    ) -> None:
        handle = self.handles[key]
        self.fused = self.buffer.combine_fused(
            y.to(self.buffer.device),
            handle,
            topk_weights=None if weights is None else weights.to(self.buffer.device),
            out=self._out(handle),
            combine_format=self._combine_formats.get(key),  # type: ignore[arg-type]
        )

    def fused_result(self) -> Snapshot | torch.Tensor:
        """What the last fused operation gave."""
        if isinstance(self.fused, torch.Tensor):
            return self.fused.cpu().clone()
        return self._snapshot(self.fused)

    def query(self, name: str, *arguments: Any) -> Any:
        """An attribute of the Buffer, called if it is a method."""
        value = getattr(self.buffer, name)
        return value(*arguments) if callable(value) else value

    def meet_within(self, seconds: float) -> None:
        """How long the rank waits for others on the host."""
        self.buffer.world.timeout_s = seconds

    def mask(self) -> torch.Tensor:
        """Which ranks are masked, as the device has it."""
        return self.buffer.rank_mask().cpu()

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


def _laid_out(scales: torch.Tensor, order: str, device: torch.device) -> torch.Tensor:
    """The same scales on the device, in other strides."""
    rows, words = scales.shape
    if order == "columns":
        return scales.t().contiguous().to(device).t()
    if order == "gaps":
        wide = torch.full((rows, 2 * words), -1, dtype=scales.dtype)
        wide[:, ::2] = scales
        return wide.to(device)[:, ::2]
    return scales.to(device)


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
