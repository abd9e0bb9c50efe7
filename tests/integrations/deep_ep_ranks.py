"""Processes that form a torch.distributed group; a test runs the same function on all of them.

    pool.run(function, *arguments)     # function(rank, *arguments) on every rank; results by rank

Functions are sent by name, so they stand at the top of a module.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from gpus import OWN_PROCESS
from torch.distributed import TCPStore

REPLY_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Rank:
    """What a function of a test knows of where it runs."""

    rank: int
    num_ranks: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def settle(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def barrier(self) -> None:
        self.settle()
        dist.barrier(self.group)


class RankPool:
    """The processes; stop() ends them."""

    def __init__(
        self, num_ranks: int, on_gpu: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.num_ranks = num_ranks
        self.on_gpu = on_gpu
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "ep_runtime.buffer", "ranks"])
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, num_ranks, self._store.port, on_gpu, environment),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Raises AssertionError with the first failed rank's traceback; then the group is over."""
        for pipe in self._pipes:
            pipe.send_bytes(_pack((function, arguments)))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(1.0 if failures else REPLY_TIMEOUT_S):
                failures.append(f"rank {rank} did not answer")
                continue
            ok, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    @property
    def stopped(self) -> bool:
        return not self._pipes

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._pipes = []


def _pack(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _work(
    pipe: Connection,
    rank: int,
    num_ranks: int,
    port: int,
    on_gpu: bool,
    environment: dict[str, str] | None,
) -> None:
    os.environ.update({**OWN_PROCESS, **(environment or {})})
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # Not NCCL: it refuses ranks that share a GPU, and the group is only needed for its store.
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    assert dist.group.WORLD is not None
    place = Rank(rank, num_ranks, device, dist.group.WORLD)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = torch.load(io.BytesIO(message), weights_only=False)
            answer = (True, function(place, *arguments))
        except BaseException:  # noqa: BLE001 - goes to the test
            answer = (False, traceback.format_exc())
        pipe.send_bytes(_pack(answer))
