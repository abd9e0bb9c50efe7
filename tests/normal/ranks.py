"""Groups of normal buffers, driven without knowing where their ranks run.

`run(program, arguments)` calls the same module-level function on every rank at the same time:
`program(buffer, *arguments[rank])`, CPU tensors in and out. Ranks are threads of this process
(virtual ranks) or processes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import programs
import torch
from gpus import OWN_PROCESS, num_gpus
from torch.distributed import TCPStore

from ep_runtime import World
from ep_runtime.normal import NormalBuffer, virtual_normal_ranks

REPLY_TIMEOUT_S = 100.0
Program = Callable[..., Any]


class Group(ABC):
    """The ranks of a test. Results of `outcomes` are values or exceptions, by rank."""

    num_ranks: int

    @abstractmethod
    def outcomes(
        self, program: Program, arguments: Sequence[tuple[Any, ...] | None]
    ) -> list[Any]: ...

    @abstractmethod
    def close(self) -> None: ...

    def run(
        self, program: Program, arguments: Sequence[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        """Results of all ranks; raises the first rank's exception."""
        given = [()] * self.num_ranks if arguments is None else arguments
        results = self.outcomes(program, given)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def fill_allocator(buffer: NormalBuffer) -> None:
    """Give torch's allocator memory for this stream in advance.

    Memory that it takes from the driver while another rank's kernel waits on the same GPU could
    make the two wait for each other.
    """
    small = [torch.empty(1 << 20, dtype=torch.uint8, device=buffer.device) for _ in range(24)]
    large = [torch.empty(48 << 20, dtype=torch.uint8, device=buffer.device) for _ in range(2)]
    del small, large


class ThreadGroup(Group):
    """Virtual ranks: one thread each, on a GPU with a stream of its own each."""

    def __init__(
        self, num_ranks: int, backend: str, devices: Sequence[int] | None, **sizes: Any
    ) -> None:
        self.num_ranks = num_ranks
        self.buffers = virtual_normal_ranks(
            num_ranks,
            backend=backend,  # type: ignore[arg-type]
            devices=devices,
            **sizes,
        )
        on_gpu = self.buffers[0].device.type == "cuda"
        self.streams = [torch.cuda.Stream(b.device) if on_gpu else None for b in self.buffers]
        self.threads = [ThreadPoolExecutor(1) for _ in range(num_ranks)]
        if on_gpu:
            self.run(fill_allocator)

    def outcomes(self, program: Program, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        waiting = [
            None if given is None else self.threads[rank].submit(self._call, rank, program, given)
            for rank, given in enumerate(arguments)
        ]
        results: list[Any] = []
        for one in waiting:
            error = None if one is None else one.exception(REPLY_TIMEOUT_S)
            results.append(error or (None if one is None else one.result()))
        return results

    def _call(self, rank: int, program: Program, given: tuple[Any, ...]) -> Any:
        stream = self.streams[rank]
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return program(self.buffers[rank], *given)

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()
        for buffer in self.buffers:  # frees memory, for which the driver waits until all is done
            programs.drop_all(buffer)
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Processes that build normal buffers on demand; started once, used by many groups."""

    def __init__(
        self, num_ranks: int, backend: str, environment: dict[str, str] | None = None
    ) -> None:
        self.num_ranks = num_ranks
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "ep_runtime.normal", "ranks"])
        self.processes = []
        self.pipes: list[Connection] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, num_ranks, self.store.port, backend, environment or {}),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def ask(self, commands: Sequence[tuple[Any, ...] | None]) -> list[Any]:
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
        if kind == "value":
            return value
        error = value[0].__new__(value[0])
        error.args = (value[1],)
        vars(error).update(value[2])
        return error

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class ProcessGroup(Group):
    """One process per rank."""

    def __init__(self, pool: Processes, **sizes: Any) -> None:
        self.pool = pool
        self.num_ranks = pool.num_ranks
        for answer in pool.ask([("open", sizes)] * pool.num_ranks):
            if isinstance(answer, BaseException):
                raise answer

    def outcomes(self, program: Program, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        return self.pool.ask(
            [None if given is None else ("call", program, given) for given in arguments]
        )

    def close(self) -> None:
        self.pool.ask([("close",)] * self.num_ranks)


def _work(
    pipe: Connection,
    rank: int,
    num_ranks: int,
    port: int,
    backend: str,
    environment: dict[str, str],
) -> None:
    os.environ.update({**OWN_PROCESS, **environment})
    torch.set_num_threads(1)
    if backend == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    buffer: NormalBuffer | None = None

    def run(kind: str, *rest: Any) -> Any:
        nonlocal buffer
        if kind == "open":
            world = World.from_store(store, rank, num_ranks, 30.0)
            buffer = NormalBuffer(world, backend=backend, **rest[0])  # type: ignore[arg-type]
            return None
        assert buffer is not None
        if kind == "close":
            buffer.close()
            return programs.drop_all(buffer)
        program, given = rest
        return program(buffer, *given)

    while True:
        try:
            command = _unpack(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = _pack(("value", run(*command)))
        except Exception as error:  # noqa: BLE001 - goes to the test
            answer = _pack(("error", (type(error), str(error), vars(error))))
        pipe.send_bytes(answer)


def _pack(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)  # pickle alone cannot load FP8 tensors
    return stream.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


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
    Place("threads", "host", 1),
    Place("threads", "host", 2),
    Place("threads", "host", 8),
    Place("processes", "host", 2),
    Place("processes", "host", 4),
]
GPU_PLACES = [
    Place("threads", "cuda", 1, (0,)),
    Place("threads", "cuda", 2, (0,)),
    Place("threads", "cuda", 4, (0,)),
    Place("threads", "cuda", 8, (0,)),
]


def multi_places() -> list[Place]:
    """A rank on every GPU, two ranks on each of at most four GPUs, a process for every GPU."""
    every = tuple(range(num_gpus()))
    some = every[:4]
    return [
        Place("threads", "cuda", len(every), every),
        Place("threads", "cuda", 2 * len(some), some),
        Place("processes", "cuda", len(every)),
    ]
