"""Groups of ranks that a test drives without knowing where they run.

`Driver` lives beside one rank's Buffer and takes CPU tensors. A `Group` calls the same method of
every rank's driver: in this process (virtual ranks), or in one process per rank.
"""

from __future__ import annotations

import io
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from support import Snapshot, poison
from torch.distributed import TCPStore

from ep_runtime import Buffer, EpConfig, World, virtual_ranks
from ep_runtime.pending import Pending
from ep_runtime.reference import RankInput

REPLY_TIMEOUT_S = 60.0


class Driver:
    """One rank: moves inputs to its device, poisons outputs, copies results back."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.pending: dict[int, Pending[Any]] = {}
        self.handles: dict[int, Any] = {}

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

    def dispatch_fused(self, rank_input: RankInput, chain: int = 0) -> Snapshot:
        (x, idx, weights), options = self._on_device(rank_input, None)
        self._poison_inbox(chain)
        received = self.buffer.dispatch_fused(x, idx, weights, chain=chain, **options)
        self.handles[chain] = received.handle
        return self._snapshot(received)

    def combine_fused(self, y: torch.Tensor, chain: int = 0) -> torch.Tensor:
        handle = self.handles[chain]
        out = self.buffer.combine_fused(y.to(self.buffer.device), handle, out=self._out(handle))
        return out.cpu().clone()

    def query(self, name: str, *arguments: Any) -> Any:
        """An attribute of the Buffer, called if it is a method."""
        value = getattr(self.buffer, name)
        return value(*arguments) if callable(value) else value

    def synchronize(self) -> None:
        self.buffer._ops.synchronize()


class Group(ABC):
    """The ranks of a test, all with the same configuration."""

    num_ranks: int
    can_fuse = False
    concurrent = False  # ranks run by themselves: one may wait while another has not sent

    @abstractmethod
    def outcomes(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """Call `method` on every rank whose arguments are not None; results or exceptions."""

    @abstractmethod
    def close(self) -> None: ...

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Results of all ranks; raises the first rank's exception."""
        results = self.outcomes(method, [()] * self.num_ranks if arguments is None else arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """`each`, with the same arguments on every rank."""
        return self.each(method, [arguments] * self.num_ranks)

    def dispatch(self, inputs: list[RankInput], chain: int = 0, **options: Any) -> list[Snapshot]:
        expected, extra = options.get("expected"), options.get("extra_stride", 0)
        self.each("dispatch", [(one, chain, expected, extra) for one in inputs])
        return self.all("receive", chain)

    def combine(
        self, outputs: list[torch.Tensor], chain: int = 0, extra_stride: int = 0
    ) -> list[torch.Tensor]:
        self.each("combine", [(y, chain, extra_stride) for y in outputs])
        return self.all("collect", chain)


class VirtualGroup(Group):
    """Ranks of this process."""

    def __init__(
        self, config: EpConfig, num_ranks: int, backend: str, devices: Sequence[int] | None
    ) -> None:
        buffers = virtual_ranks(config, num_ranks, backend, devices)  # type: ignore[arg-type]
        self.num_ranks = num_ranks
        self.drivers = [Driver(buffer) for buffer in buffers]
        self.can_fuse = backend == "cuda" and devices is not None and len(devices) >= num_ranks

    def outcomes(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        results: list[Any] = []
        for driver, given in zip(self.drivers, arguments, strict=True):
            try:
                results.append(None if given is None else getattr(driver, method)(*given))
            except Exception as error:  # noqa: BLE001 - returned to the test
                results.append(error)
        return results

    def close(self) -> None:
        for driver in self.drivers:
            driver.buffer.close()


class ProcessPool:
    """Processes that wait for a configuration; started once, used by many groups."""

    def __init__(self, num_ranks: int, backend: str) -> None:
        self.num_ranks = num_ranks
        self.backend = backend
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "ep_runtime.buffer", "groups"])
        self.processes = []
        self.pipes: list[Connection] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, rank, num_ranks, self.store.port, backend), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def ask(self, commands: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """Send each rank its command (None: leave it alone), then collect what they answer."""
        for pipe, command in zip(self.pipes, commands, strict=True):
            if command is not None:
                pipe.send_bytes(_pack(command))
        return [
            None if command is None else self._answer(rank) for rank, command in enumerate(commands)
        ]

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(REPLY_TIMEOUT_S):
            self.stop()
            raise TimeoutError(f"rank {rank} hung for {REPLY_TIMEOUT_S} s")
        kind, value = _unpack(self.pipes[rank].recv_bytes())
        return _rebuild(*value) if kind == "error" else value

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class ProcessGroup(Group):
    """One process per rank, out of a pool."""

    can_fuse = True
    concurrent = True

    def __init__(self, config: EpConfig, pool: ProcessPool) -> None:
        self.pool = pool
        self.num_ranks = pool.num_ranks
        for answer in pool.ask([("open", config)] * self.num_ranks):
            if isinstance(answer, BaseException):
                raise answer

    def outcomes(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        return self.pool.ask(
            [None if given is None else ("call", method, given) for given in arguments]
        )

    def close(self) -> None:
        self.pool.ask([("close",)] * self.num_ranks)


def _work(pipe: Connection, rank: int, num_ranks: int, port: int, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    driver: Driver | None = None

    def run(kind: str, *rest: Any) -> Any:
        nonlocal driver
        if kind == "open":
            world = World.from_store(store, rank, num_ranks)
            driver = Driver(Buffer(rest[0], world, backend))  # type: ignore[arg-type]
            return None
        assert driver is not None
        if kind == "close":
            driver.buffer.close()
            return None
        method, given = rest
        return getattr(driver, method)(*given)

    while True:
        try:
            command = _unpack(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(_answer_of(lambda: run(*command)))  # noqa: B023 - called at once


def _answer_of(step: Callable[[], Any]) -> bytes:
    try:
        return _pack(("value", step()))
    except Exception as error:  # noqa: BLE001 - goes to the test
        return _pack(("error", (type(error), str(error), vars(error))))


def _pack(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)  # pickle alone cannot load FP8 tensors
    return stream.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _rebuild(kind: type[BaseException], text: str, attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind)
    error.args = (text,)
    vars(error).update(attributes)
    return error


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group are. devices: of virtual CUDA ranks, in turn."""

    kind: str
    backend: str
    num_ranks: int
    devices: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        spread = "" if not self.devices or len(self.devices) < 2 else f"-{len(self.devices)}gpus"
        return f"{self.backend}-{self.kind}{self.num_ranks}{spread}"


HOST_PLACES = [
    Place("virtual", "host", 2),
    Place("virtual", "host", 4),
    Place("virtual", "host", 8),
    Place("processes", "host", 2),
    Place("processes", "host", 4),
]
GPU_PLACES = [
    Place("virtual", "cuda", 2, (0,)),
    Place("virtual", "cuda", 4, (0,)),
    Place("virtual", "cuda", 8, (0,)),
]
MULTI_PLACES = [
    Place("virtual", "cuda", 2, (0, 1)),
    Place("virtual", "cuda", 4, (0, 1)),
    Place("processes", "cuda", 2),
]
