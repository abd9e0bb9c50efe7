"""The whole GPU suite in passes, for `make gpu-test`.

    python -m benchmarks.gpu_suite [arguments of pytest]

First the tests of one GPU, then those of several, with many at a time where pytest-xdist is
installed: most of their time goes by on the CPU. Then those that no other test may disturb, one
after the other.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

PER_GPU = 4  # workers: more of them only wait for each other while torch loads its kernels
ACROSS_GPUS = 12  # workers times GPUs, where every worker uses all of them
WORKER_BYTES = 10 << 30  # of GPU memory: every kernel of torch is loaded, and torch keeps a cache
NOTHING_TO_RUN = 5  # pytest's exit status
REPORT_S = 20.0  # for pytest to say what it has, after Ctrl-C

ONE_GPU = "gpu and not alone and not multi"
ALL_GPUS = "multi and not alone"

Pass = tuple[str, list[str]]


def num_workers(gpus: int, cores: int, gpu_bytes: int) -> int:
    """Of pytest-xdist. 0: tests run one by one. Every worker wants a core and some memory."""
    workers = min(gpus * min(PER_GPU, gpu_bytes // WORKER_BYTES), cores - 1)
    return workers if workers > 1 else 0


def find_workers() -> int:
    """num_workers() of this machine; 0 without a GPU or pytest-xdist."""
    gpus = torch.cuda.device_count()
    if not gpus or importlib.util.find_spec("xdist") is None:
        return 0
    # Asked in a process of its own, so that no context stays in this one, which only waits.
    memory = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    found = subprocess.run([sys.executable, "-c", memory], capture_output=True, text=True)
    if found.returncode:
        return 0  # pytest will say what is wrong with the GPU
    return num_workers(gpus, len(os.sched_getaffinity(0)), int(found.stdout))


def beside(workers: int, *more: str) -> list[str]:
    """Arguments of pytest for so many workers. Groups of tests stay together; the others are
    given out one by one, since some are slow and most are not."""
    if workers < 2:
        return []
    return ["-n", str(workers), "--dist=loadgroup", *more]


def across_gpus(workers: int, gpus: int) -> int:
    """Of so many workers, those that may use all GPUs together.

    Processes take turns on a GPU, and an operation goes on only while all of its ranks have theirs:
    the more GPUs, the less often.
    """
    return min(workers, ACROSS_GPUS // gpus)


def passes(workers: int, gpus: int) -> list[Pass]:
    """(which tests, more arguments of pytest). Tests of one GPU are spread over all of them."""
    one = (ONE_GPU, beside(workers, "--gpu-per-worker"))
    if gpus < 2:
        return [one, ("alone", [])]
    return [one, (ALL_GPUS, beside(across_gpus(workers, gpus))), ("alone", [])]


def status(codes: Sequence[int]) -> int:
    """Of the whole: the first failure; a pass may be empty (`-k` chose none of it), but not all."""
    bad = [code for code in codes if code not in (0, NOTHING_TO_RUN)]
    return bad[0] if bad else min(codes)


def _run(command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:  # pytest was interrupted as well
        process.wait(REPORT_S)
        raise
    finally:
        process.kill()


def main(arguments: Sequence[str]) -> int:
    gpus = torch.cuda.device_count()
    if gpus < 2:
        print(f"tests marked multi need two GPUs: left out, {gpus} here", flush=True)
    codes = []
    for marked, more in passes(find_workers(), gpus):
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-rs", "--require-gpu", "-m", marked, *more]
        codes.append(_run([*command, *arguments]))
        print(f"{marked}: {time.monotonic() - began:.0f} s, status {codes[-1]}\n", flush=True)
    return status(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
