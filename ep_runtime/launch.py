"""Ranks as processes of one command, without torchrun; under torchrun, this process as its rank.

    results = launch(train, 4, config)          # train(world, config) on ranks 0 .. 3

`launch` ends all ranks at the first failure. `run_ranks` lets the others go on and reports what
became of each, for callers that want to see how a group takes the loss of a rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from typing_extensions import TypeVarTuple, Unpack

from ep_runtime import env, logs
from ep_runtime.errors import ConfigError, EpError, GroupFault
from ep_runtime.world import World, limit_of

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

MAX_RUN_S = 2e6  # what poll() takes: 2^31 milliseconds
HOST = "127.0.0.1"
STOP_GRACE_S = 5.0  # between asking a process to end and ending it
EXIT_GRACE_S = 20.0  # for a rank that has delivered its result to end by itself


class RankFailed(GroupFault):
    """A rank ended without a result.

    `rank` is its number, `kind` the class name of its exception (or "exit" for a process that
    died), `text` the exception's message, `trace` its traceback as text.
    """

    def __init__(self, rank: int, kind: str, text: str, trace: str = "") -> None:
        super().__init__(f"rank {rank} failed with {kind}: {text}")
        self.rank = rank
        self.kind = kind
        self.text = text
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes: BaseException keeps the message alone."""
        return type(self), (self.rank, self.kind, self.text, self.trace)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """What became of a rank: a failure, or else the result."""

    rank: int
    result: R | None
    failure: RankFailed | None
    seconds: float  # from the start of the group to this rank's report


def launch(
    fn: Callable[[World, Unpack[Ts]], R],
    num_ranks: int,
    *args: Unpack[Ts],
    gpu_per_rank: bool = False,
    timeout_s: float | None = None,
) -> list[R]:
    """Run `fn(world, *args)` on every rank; the results by rank.

    fn            importable by its module's name: it is pickled, and so are args and results; not
                  from a notebook or standard input, which new processes cannot import
    gpu_per_rank  make GPU `rank` (modulo their number) the rank's current device
    timeout_s     for the whole run; None: EP_LAUNCH_TIMEOUT_S. Ignored under torchrun

    Under torchrun this process is a rank already: fn runs here, the list holds its result alone,
    and nothing ends it after timeout_s: that is the launcher's affair.

    Raises RankFailed for the first rank that fails, after ending the others, and ConfigError where
    num_ranks is not what torchrun started, timeout_s is no time, or fn or args cannot be sent.
    """
    settings = env.read()
    if settings.under_torchrun:
        if settings.world_size != num_ranks:
            raise ConfigError(
                f"{num_ranks} ranks were asked for, but the launcher started WORLD_SIZE="
                f"{settings.world_size}; make the two equal"
            )
        if gpu_per_rank:
            use_gpu(settings.local_rank if settings.local_rank is not None else settings.rank or 0)
        return [fn(World.from_env(), *args)]
    group = _Group(fn, num_ranks, args, gpu_per_rank, timeout_s)
    results: list[R] = []
    for outcome in sorted(group.run(stop_at_failure=True), key=lambda o: o.rank):
        if outcome.failure is not None:
            raise outcome.failure from _there(outcome.failure)
        results.append(outcome.result)  # type: ignore[arg-type]
    return results


class RemoteTraceback(Exception):
    """Where in a rank's own process it failed: the cause of the RankFailed that launch() raises."""


def _there(failure: RankFailed) -> RemoteTraceback | None:
    if not failure.trace:
        return None
    return RemoteTraceback(f"\n\nrank {failure.rank}: {failure.trace}")


def run_ranks(
    fn: Callable[[World, Unpack[Ts]], R],
    num_ranks: int,
    *args: Unpack[Ts],
    gpu_per_rank: bool = False,
    timeout_s: float | None = None,
) -> list[Outcome[R]]:
    """Like `launch`, but every rank runs to its own end and none raises here.

    Raises ConfigError under torchrun, where each process would start ranks of its own.
    """
    if env.read().under_torchrun:
        raise ConfigError("run_ranks() starts the ranks itself: run it without torchrun")
    group = _Group(fn, num_ranks, args, gpu_per_rank, timeout_s)
    return sorted(group.run(stop_at_failure=False), key=lambda o: o.rank)


def use_gpu(local_rank: int) -> None:
    """Make one GPU this process's current device. Ranks beyond the number of GPUs share them."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


class _Group(Generic[R]):
    """The processes of one run, their store, and the pipes their reports come through."""

    def __init__(
        self,
        fn: Callable[..., R],
        num_ranks: int,
        args: tuple[Any, ...],
        gpu_per_rank: bool,
        timeout_s: float | None,
    ) -> None:
        if type(num_ranks) is not int or num_ranks < 1:
            raise ConfigError(f"num_ranks={num_ranks!r}: start at least 1 rank")
        if timeout_s is None:
            timeout_s = env.read().launch_timeout_s
        self.timeout_s = limit_of(timeout_s, MAX_RUN_S)
        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self.started = time.monotonic()
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.open: dict[connection.Connection, int] = {}
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(num_ranks):
                here, there = context.Pipe(duplex=False)
                task = _Task(fn, args, rank, num_ranks, self.store.port, gpu_per_rank)
                process = context.Process(target=_rank_main, args=(task, there))
                process.start()
                there.close()  # so that the end of the process is the end of the pipe
                self.processes.append(process)
                self.open[here] = rank
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._end(STOP_GRACE_S)
            raise ConfigError(
                f"{fn!r} or its arguments cannot be sent to the ranks' processes ({error}); give a"
                " function that can be imported by its module's name, and arguments that can be"
                " pickled"
            ) from error
        except BaseException:
            self._end(STOP_GRACE_S)
            raise

    def run(self, stop_at_failure: bool) -> list[Outcome[R]]:
        """Outcomes in the order they came; up to the first failure where that ends the run."""
        outcomes: list[Outcome[R]] = []
        grace = 0.0
        try:
            while self.open:
                left = self.started + self.timeout_s - time.monotonic()
                ready = connection.wait(list(self.open), timeout=max(left, 0.0))
                if not ready:
                    return outcomes + [self._late(rank) for rank in self.open.values()]
                for pipe in ready:
                    assert isinstance(pipe, connection.Connection)
                    outcomes.append(self._report(pipe, self.open.pop(pipe)))
                    if stop_at_failure and outcomes[-1].failure is not None:
                        return outcomes
            grace = EXIT_GRACE_S
            return outcomes
        finally:
            self._end(grace)

    def _report(self, pipe: connection.Connection, rank: int) -> Outcome[R]:
        seconds = time.monotonic() - self.started
        try:
            ok, content = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process = self.processes[rank]
            process.join(EXIT_GRACE_S)
            text = (
                f"its process ended ({_exit_text(process.exitcode)}) without a word; see what it"
                " printed before (SIGKILL is often the system, out of memory; a file that is not"
                " found: the function must be in one that can be imported)"
            )
            return Outcome(rank, None, RankFailed(rank, "exit", text), seconds)
        except Exception as error:  # noqa: BLE001 - of a class of the caller's
            kind = type(error).__name__
            text = f"its result cannot be unpickled here ({kind}: {error}); return another"
            return Outcome(rank, None, RankFailed(rank, kind, text), seconds)
        finally:
            pipe.close()
        if ok:
            return Outcome(rank, content, None, seconds)
        return Outcome(rank, None, RankFailed(rank, **content), seconds)

    def _late(self, rank: int) -> Outcome[R]:
        text = (
            f"it was not done after {self.timeout_s:g} s and was ended; raise EP_LAUNCH_TIMEOUT_S "
            "if it was only slow"
        )
        return Outcome(rank, None, RankFailed(rank, "timeout", text), self.timeout_s)

    def _end(self, grace: float) -> None:
        """No process of this group is left when this returns."""
        deadline = time.monotonic() + grace
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + STOP_GRACE_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True, slots=True)
class _Task:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    num_ranks: int
    port: int
    gpu_per_rank: bool


def _rank_main(task: _Task, report: connection.Connection) -> None:
    """The body of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // task.num_ranks))
    try:
        logs.start(task.rank)
        if task.gpu_per_rank:
            use_gpu(task.rank)
        limit = timedelta(seconds=env.read().warmup_timeout_s)
        store = TCPStore(HOST, task.port, is_master=False, timeout=limit)
        world = World.from_store(store, task.rank, task.num_ranks)
        message = pickle.dumps((True, task.fn(world, *task.args)))
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent must hear of it
        trace = traceback.format_exc()
        if not isinstance(error, EpError):
            sys.stderr.write(f"rank {task.rank}: {trace}")
        told = {"kind": type(error).__name__, "text": str(error), "trace": trace}
        message = pickle.dumps((False, told))
    report.send_bytes(message)
    report.close()


def _end_with_parent() -> None:
    """A killed parent cannot end its ranks, so they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "no exit status yet"
    if code >= 0:
        return f"exit status {code}"
    return f"signal {signal.Signals(-code).name}"
