"""Everything that a host with several GPUs is wanted for, in one command and nine minutes.

    make scale-test                                   # or: python -m benchmarks.scale_test
    make scale-test ARGS="--only replay,low-latency"
    make scale-test ARGS="--dry-run --gpus 8"         # what would run on eight GPUs

The tests of several GPUs and the random replays with a rank on every GPU, then the benchmarks
beside every installed peer, what matters most first. On one GPU the tests of one GPU run, and
benchmarks with two ranks that share it under MPS, which measures no link.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu_suite import (
    ALL_GPUS,
    ONE_GPU,
    PER_GPU,
    across_gpus,
    beside,
    find_workers,
)
from benchmarks.timed_parts import Part, run_parts, summary
from ep_runtime.bench import report
from ep_runtime.bench.records import read_records
from ep_runtime.cli_bench import app

CHECKOUT = Path(__file__).resolve().parents[1]
TOTAL_S = 540.0
SPARE_S = 8.0  # at the end, for plots of benchmarks that were ended early
SHARED_RANKS = 2  # on one GPU
DECODE_EXPERTS = 256
MORE_EXPERTS = 288  # with redundant ones
PREFILL_EXPERTS = 256
DECODE_TOKENS = "1,8,32,64,128"  # in Buffers of 128 tokens, as a decode server has them
LARGE_TOKENS = "512,1024"
PREFILL_TOKENS = "4096"
FIRST_TESTS = ("tests/backends", "tests/normal")
BENCH_TESTS = "tests/unit"  # one by one they are long, and the benchmarks themselves follow
REPLAY_TEST = "tests/graphs/test_any_order_gpu.py"
# A rank on every GPU is a process here; ranks of one process are left to `make gpu-test`.
REAL_RANKS = "not virtual and not threads"
OURS = ("--peers", "none", "--no-parts")  # what is quickest
TABLES = 70  # lines of a benchmark's output that hold its tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to run.

    gpus         of this host
    with_normal  `ep-runtime bench` has `normal`
    workers      of pytest-xdist, for tests that others do not disturb; 0: one by one
    """

    gpus: int
    with_normal: bool
    workers: int = 0
    out: Path = Path("benchmarks/results")
    label: str = "scale"

    @property
    def ranks(self) -> int:
        return self.gpus if self.gpus > 1 else SHARED_RANKS

    def unshared(self, experts: int) -> str:
        """Why so many experts cannot be used, or "": the ranks must have equally many."""
        return f"E={experts} is no multiple of {self.ranks} ranks" if experts % self.ranks else ""


def plan(request: Request) -> list[Part]:
    """All parts, the most important first. Their shares add up to less than TOTAL_S."""
    one = request.gpus == 1
    marked, alone = (ONE_GPU, "alone") if one else (ALL_GPUS, "alone and multi")
    workers = beside(request.workers if one else across_gpus(request.workers, request.gpus))
    large, more = f"{request.label}-large", f"{request.label}-more"
    others = [folder for folder in folders_with_tests() if folder not in FIRST_TESTS]
    folders = [*FIRST_TESTS, *others]
    ways = ["--timeout=60", "--durations=5", f"--ignore={REPLAY_TEST}"]
    if not one:
        ways += ["-k", REAL_RANKS]
    return [
        _tests("suite", marked, [*folders, *ways, *workers], 165),
        _tests("alone", alone, [f for f in folders if f != BENCH_TESTS] + ways, 70),
        _tests("replay", "gpu and not multi" if one else "multi", [REPLAY_TEST], 72),
        _low_latency("low-latency", request, DECODE_EXPERTS, DECODE_TOKENS, request.label, 65),
        _normal(request, 42),
        _low_latency("large", request, DECODE_EXPERTS, LARGE_TOKENS, large, 68),
        _low_latency("more", request, MORE_EXPERTS, DECODE_TOKENS, more, 38, OURS),
    ]


def folders_with_tests() -> list[str]:
    """Folders of the checkout that hold tests, in order."""
    files = (CHECKOUT / "tests").glob("*/test_*.py")
    return sorted({file.parent.relative_to(CHECKOUT).as_posix() for file in files})


def notes(request: Request) -> list[str]:
    """What a reader must know before the results."""
    said = []
    if request.gpus == 1:
        said.append(f"{SHARED_RANKS} ranks share the GPU under MPS: no link is measured")
    else:
        said.append("tests that use one GPU, or ranks of one process, are left to `make gpu-test`")
        if request.gpus not in (2, 4, 8):
            said.append("tests use 2, 4 or 8 GPUs, benchmarks all of them")
    wanted = (DECODE_EXPERTS, MORE_EXPERTS)
    said += [f"left out: {why}" for why in map(request.unshared, wanted) if why]
    if not request.workers:
        said.append("no pytest-xdist: tests run one by one, and may not all find the time")
    return said


def _tests(name: str, marked: str, more: Sequence[str], share_s: float) -> Part:
    pytest = (sys.executable, "-m", "pytest", "-q", "-rfEs", "--require-gpu", "-m", marked)
    return Part(name=name, command=(*pytest, *more), share_s=share_s, lines=20)


def _low_latency(
    name: str,
    request: Request,
    experts: int,
    tokens: str,
    label: str,
    share_s: float,
    more: Sequence[str] = (),
) -> Part:
    options = ["--tokens", tokens, "--experts", str(experts), "--topk", "8", "--hidden", "7168"]
    options += more
    return Part(
        name=name,
        command=_bench("low-latency", request, options, label),
        share_s=share_s,
        skip=request.unshared(experts),
        lines=TABLES,
    )


def _normal(request: Request, share_s: float) -> Part:
    skip = request.unshared(PREFILL_EXPERTS)
    if not request.with_normal:
        skip = "`ep-runtime bench` has no command `normal` in this build"
    command = _bench("normal", request, ["--tokens", PREFILL_TOKENS], request.label)
    return Part(name="normal", command=command, share_s=share_s, skip=skip, lines=TABLES)


def _bench(what: str, request: Request, options: list[str], label: str) -> tuple[str, ...]:
    place = ["--ranks", str(request.ranks), "--out", str(request.out), "--label", label, "--plot"]
    return (sys.executable, "-m", "ep_runtime", "bench", what, *options, *place)


def draw_missing_plots(out: Path, label: str, since: float) -> list[Path]:
    """Plots of low-latency results written after `since` whose run did not come to its plot."""
    drawn = []
    for path in sorted(out.glob(f"low-latency-*-{label}*.json")):
        picture = path.with_suffix(".png")
        written = path.stat().st_mtime
        if written >= since and (not picture.exists() or picture.stat().st_mtime < since):
            drawn.append(report.plot(read_records(path), picture))
    return drawn


def select(parts: Sequence[Part], only: str) -> list[Part]:
    """The parts that the comma-separated `only` names ("": all). Raises ValueError for others."""
    if not only:
        return list(parts)
    wanted = set(only.split(","))
    if unknown := sorted(wanted - {part.name for part in parts}):
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"--only {','.join(unknown)}: the parts are {names}")
    return [part if part.name in wanted else replace(part, skip="not asked for") for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    """Run. Returns 1 if a part failed or was ended at its limit, 2 for a command that is wrong."""
    began, since = time.monotonic(), time.time()
    options = _options(argv)
    try:
        request = _request(options)
        parts = select(plan(request), options.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"GPUs: {request.gpus}, ranks: {request.ranks}", *notes(request), sep="; ", flush=True)
    if options.dry_run:
        for part in parts:
            when = part.skip or f"{part.share_s:.0f} s"
            print(f"{part.name} ({when}): {shlex.join(part.command)}")
        return 0
    left_s = options.seconds - SPARE_S - (time.monotonic() - began)
    outcomes = run_parts(parts, left_s, options.logs, lambda line: print(line, flush=True))
    for path in draw_missing_plots(options.out, options.label, since):
        print(f"drew {path} from what its run had written when it was ended")
    print(f"\n{summary(outcomes)}\n{time.monotonic() - began:.0f} s in all")
    return int(any(outcome.bad for outcome in outcomes))


def _request(options: argparse.Namespace) -> Request:
    """Raises ValueError where the options do not fit this host."""
    if options.gpus and not options.dry_run:
        raise ValueError("--gpus is for --dry-run; CUDA_VISIBLE_DEVICES hides GPUs from a run")
    if options.seconds <= 2 * SPARE_S:
        raise ValueError(f"--seconds {options.seconds:g}: give more than {2 * SPARE_S:g}")
    gpus = options.gpus or torch.cuda.device_count()
    if gpus < 1:
        raise ValueError(f"{gpus} GPUs here; --dry-run --gpus 8 shows what would run on eight")
    return Request(
        gpus=gpus,
        with_normal=any(command.name == "normal" for command in app.registered_commands),
        workers=gpus * PER_GPU if options.dry_run else find_workers(),
        out=options.out,
        label=options.label,
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_test",
        description="GPU tests, random replays and benchmarks over all GPUs of this host.",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--label", default="scale", help="part of the result files' names")
    parser.add_argument("--logs", type=Path, default=Path("build/scale-test"))
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything")
    parser.add_argument("--only", default="", help="names of parts, comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument(
        "--gpus", type=int, default=0, help="of a --dry-run; 0: those that are here"
    )
    return parser.parse_args(argv)


def _end_children(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # Parts run in sessions of their own: without this they would outlive a `kill` of this program.
    signal.signal(signal.SIGTERM, _end_children)
    # A job in the background ignores SIGINT and would hand that on to parts, which need it to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
