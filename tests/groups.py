"""Groups of ranks that a test drives without knowing where they run.

A `Group` calls the same method of every rank's `Driver`: in this process (virtual ranks), or in one
process per rank.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from drivers import PLAIN, Driver, Options
from gpus import OWN_PROCESS, num_gpus
from support import Snapshot
from torch.distributed import TCPStore

from ep_runtime import Buffer, EpConfig, World, virtual_ranks
from ep_runtime.reference import RankInput

REPLY_TIMEOUT_S = 60.0


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

    def dispatch(self, inputs: list[RankInput], chain: int = 0, **how: Any) -> list[Snapshot]:
        self.send(inputs, chain, **how)
        return self.all("receive", chain)

    def send(self, inputs: list[RankInput], chain: int = 0, **how: Any) -> None:
        """how: expected, extra_stride, options."""
        expected, extra = how.get("expected"), how.get("extra_stride", 0)
        options = how.get("options", PLAIN)
        self.each("dispatch", [(one, chain, expected, extra, options) for one in inputs])

    def dispatch_fused(
        self, inputs: list[RankInput], chain: int = 0, options: Options = PLAIN
    ) -> list[Snapshot]:
        self.each("dispatch_fused", [(one, chain, options) for one in inputs])
        return self.all("fused_result")

    def combine_fused(
        self,
        outputs: list[torch.Tensor],
        chain: int = 0,
        *,
        of: str | None = None,
        weights: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        own = _or_nones(weights, self.num_ranks)
        key = chain if of is None else of
        self.each("combine_fused", [(y, key, w) for y, w in zip(outputs, own, strict=True)])
        return self.all("fused_result")

    def combine(
        self,
        outputs: list[torch.Tensor],
        chain: int = 0,
        extra_stride: int = 0,
        *,
        of: str | None = None,
        weights: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """of: the receive tensors of the handle; None: the chain's own."""
        self.send_back(outputs, chain, extra_stride, of=of, weights=weights)
        return self.all("collect", chain)

    def send_back(
        self,
        outputs: list[torch.Tensor],
        chain: int = 0,
        extra_stride: int = 0,
        *,
        of: str | None = None,
        weights: list[torch.Tensor] | None = None,
    ) -> None:
        own = _or_nones(weights, self.num_ranks)
        key = chain if of is None else of
        given = [(y, key, extra_stride, w) for y, w in zip(outputs, own, strict=True)]
        self.each("combine", given)


def _or_nones(weights: list[torch.Tensor] | None, count: int) -> Sequence[torch.Tensor | None]:
    return [None] * count if weights is None else weights


class VirtualGroup(Group):
    """Ranks of this process."""

    def __init__(
        self, config: EpConfig, num_ranks: int, backend: str, devices: Sequence[int] | None
    ) -> None:
        buffers = virtual_ranks(config, num_ranks, backend, devices)  # type: ignore[arg-type]
        self.num_ranks = num_ranks
        self.drivers = [Driver(buffer) for buffer in buffers]
        self.order = list(range(num_ranks))  # in which ranks are called
        self.can_fuse = backend == "cuda" and devices is not None and len(devices) >= num_ranks

    def outcomes(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        results: list[Any] = [None] * self.num_ranks
        for rank in self.order:
            given = arguments[rank]
            try:
                if given is not None:
                    results[rank] = getattr(self.drivers[rank], method)(*given)
            except Exception as error:  # noqa: BLE001 - returned to the test
                results[rank] = error
        return results

    def close(self) -> None:
        for driver in self.drivers:
            driver.buffer.close()


class ProcessPool:
    """Processes that wait for a configuration; started once, used by many groups.

    meet_s       how long a rank waits for the others outside of operations
    environment  variables that the processes set for themselves
    """

    def __init__(
        self,
        num_ranks: int,
        backend: str,
        meet_s: float = 30.0,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.num_ranks = num_ranks
        self.backend = backend
        self.memory = "auto"
        self.open_groups = 0
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "ep_runtime.buffer", "drivers"])
        self.processes = []
        self.pipes: list[Connection] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, num_ranks, self.store.port, backend, meet_s, environment),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def ask(self, commands: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """Send each rank its command (None: leave it alone), then collect what they answer."""
        for rank, command in enumerate(commands):
            if command is not None:
                self.send(rank, command)
        return [
            None if command is None else self.answer(rank) for rank, command in enumerate(commands)
        ]

    def send(self, rank: int, command: tuple[Any, ...]) -> None:
        self.pipes[rank].send_bytes(_pack(command))

    def answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(REPLY_TIMEOUT_S):
            self.stop()
            raise TimeoutError(f"rank {rank} hung for {REPLY_TIMEOUT_S} s")
        kind, value = _unpack(self.pipes[rank].recv_bytes())
        return _rebuild(*value) if kind == "error" else value

    @property
    def as_new(self) -> bool:
        """Every process is there, and whoever opened a group has closed it."""
        return not self.open_groups and all(process.is_alive() for process in self.processes)

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
        pool.open_groups += 1

    def outcomes(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        return self.pool.ask(
            [None if given is None else ("call", method, given) for given in arguments]
        )

    def close(self) -> None:
        self.pool.ask([("close",)] * self.num_ranks)
        self.pool.open_groups -= 1


def _work(
    pipe: Connection,
    rank: int,
    num_ranks: int,
    port: int,
    backend: str,
    meet_s: float,
    environment: dict[str, str] | None,
) -> None:
    os.environ.update({**OWN_PROCESS, **(environment or {})})
    torch.set_num_threads(1)
    if backend == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    driver: Driver | None = None

    def run(kind: str, *rest: Any) -> Any:
        nonlocal driver
        if kind == "open":
            world = World.from_store(store, rank, num_ranks, meet_s)
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
    Place("virtual", "host", 8),
    Place("processes", "host", 2),
    Place("processes", "host", 4),
]
GPU_PLACES = [
    Place("virtual", "cuda", 2, (0,)),
    Place("virtual", "cuda", 4, (0,)),
    Place("virtual", "cuda", 8, (0,)),
]


def multi_places() -> list[Place]:
    """A rank on every GPU, two ranks on each of at most four GPUs, a process for every GPU."""
    every = tuple(range(num_gpus()))
    some = every[:4]
    return [
        Place("virtual", "cuda", len(every), every),
        Place("virtual", "cuda", 2 * len(some), some),
        Place("processes", "cuda", len(every)),
    ]
