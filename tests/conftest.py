"""What all tests need: the right package, and markers that skip what this machine cannot run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before CUDA starts. Ranks of one process wait for each other on their GPU: a kernel of torch that
# is loaded while one of them waits could wait for it in turn, and so could streams that share one
# of the hardware's queues.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 8  # each test may have as many ranks again


def _package_problem() -> str | None:
    """Why the installed package cannot be what is tested, or None.

    A wheel beside a checkout is hidden by the checkout's ep_runtime/ whenever the checkout is the
    current directory; then ep_runtime.graphs, which lies elsewhere in the checkout, is missing.
    """
    package = importlib.util.find_spec("ep_runtime")
    if package is None or package.origin is None:
        return "ep_runtime is not installed: run `make build`, or `pip install -e .`"
    home = Path(package.origin).resolve().parent
    if importlib.util.find_spec("ep_runtime.graphs") is None:
        return (
            f"{home} has no graphs/: this checkout hides an installed wheel. Use an editable "
            "install (`make build`, or `pip install -e .`), or run pytest from another directory"
        )
    if importlib.util.find_spec("ep_runtime._C") is None:
        return f"{home} holds no native module: run `make build`, or `pip install -e .`"
    return None


def _gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can see"
    from ep_runtime import _C

    return None if _C.has_cuda else "ep_runtime._C was built without CUDA (no nvcc was found)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail where tests marked gpu would be skipped for want of a GPU or a CUDA build",
    )
    parser.addoption(
        "--gpu-per-worker",
        action="store_true",
        help="with pytest-xdist: one GPU for each worker, in turn; skips tests marked multi",
    )


def _choose_gpu(worker: str) -> None:
    """Let worker gw<n> of pytest-xdist see one GPU alone, as yet without starting CUDA."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = listed.split(",") if listed else [str(n) for n in range(torch.cuda.device_count())]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(worker[2:]) % len(visible)]


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors: torch's threads, one for each core, would only wait for each other, and take
    # the cores from ranks and from other workers.
    torch.set_num_threads(1)
    # Files in their order: xdist would keep those with the fewest tests, which are the slowest
    # ones here, for the end, where one worker runs them and the others have nothing left.
    config.option.loadscopereorder = False
    if config.getoption("--gpu-per-worker") and hasattr(config, "workerinput"):
        _choose_gpu(config.workerinput["workerid"])
    problem = _package_problem()
    if problem is None and config.getoption("--require-gpu"):
        problem = _gpu_problem()
    if problem is not None:
        raise pytest.UsageError(problem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means (`make test`). With a GPU one test after the other, in this process:
    which tests may run beside which is known to `make gpu-test`."""
    cores = len(os.sched_getaffinity(0))
    return 0 if torch.cuda.is_available() or cores < 2 else min(cores, MOST_WORKERS)


def pytest_report_header() -> str:
    from ep_runtime import _C

    gpus = torch.cuda.device_count()
    cuda = "with" if _C.has_cuda else "without"
    return f"ep_runtime: {gpus} GPUs, native module {cuda} CUDA, torch {torch.__version__}"


def _slow_first(items: list[pytest.Item]) -> None:
    """Slow tests first, a quick one behind each: every worker begins with two tests."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    pairs = [item for pair in zip(slow, quick, strict=False) for item in pair]
    shorter = min(len(slow), len(quick))
    items[:] = [*pairs, *slow[shorter:], *quick[shorter:]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`multi` implies `gpu`: both are skipped with the reason that applies here."""
    if hasattr(config, "workerinput"):
        _slow_first(items)
    gpu_problem = _gpu_problem()
    count = torch.cuda.device_count()
    for item in items:
        wants_two = item.get_closest_marker("multi") is not None
        if wants_two and count < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs 2 NVIDIA GPUs, {count} here"))
        elif (wants_two or item.get_closest_marker("gpu")) and gpu_problem is not None:
            item.add_marker(pytest.mark.skip(reason=gpu_problem))
