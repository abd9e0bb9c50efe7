"""The CUDA kernels' steps on a machine without a GPU: every CUDA thread a fibre of one CPU thread.

The program (kernel_steps.cpp) runs the device code of csrc/cuda beside the host backend on the same
inputs and wants the same bytes. What it cannot see is memory order: that is for runs on GPUs.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
from native_build import (
    EMULATED,
    HERE,
    HOST_STEPS,
    build,
    host_sources,
    require_sanitizer,
)

WIRES = ("bf16", "fp8", "opaque")
FORMATS = ("batched", "contiguous", "compact")
# Ranks, H and K; some with every wire in every format, of the others each with one, in turn.
SHAPES = [
    ("one rank", (1, 128, 1), False),
    ("two ranks", (2, 256, 4), True),
    ("three ranks, more than eight choices", (3, 384, 9), True),
    ("five ranks, most choices", (5, 128, 32), False),
    ("rows of a large model", (2, 7168, 8), False),
    ("rows that a CTA takes in several passes", (2, 16384, 2), False),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [HERE / "kernel_steps.cpp", *host_sources(*HOST_STEPS, "row_math")]
    return build(tmp_path_factory.mktemp("kernels") / "kernel_steps", sources, *EMULATED)


@pytest.mark.parametrize(
    ("num_ranks", "hidden", "topk", "wire", "recv_format"),
    [
        pytest.param(*sizes, wire, to, id=f"{name}-{WIRES[wire]}-{FORMATS[to]}")
        for turn, (name, sizes, all_pairs) in enumerate(SHAPES)
        for wire in range(3)
        for to in range(3)
        if all_pairs or (wire + to + turn) % 3 == 0
    ],
)
def test_steps_give_the_host_backends_bytes(
    program: Path, recv_format: int, wire: int, num_ranks: int, hidden: int, topk: int
) -> None:
    # Three CTAs are fewer than tokens and messages: every loop goes round.
    compare(program, recv_format, wire, num_ranks, hidden, topk, ctas=3)


@pytest.mark.slow
def test_many_ctas_that_wait_quietly(program: Path) -> None:
    compare(program, 0, 1, 2, 128, 2, ctas=24)


@pytest.mark.slow
def test_nothing_is_read_beyond_its_memory(tmp_path: Path) -> None:
    """Every rank's memory ends where the sanitizer looks; a GPU may have something else there."""
    require_sanitizer("address", tmp_path)
    sources = [HERE / "kernel_steps.cpp", *host_sources(*HOST_STEPS, "row_math")]
    program = build(tmp_path / "kernel_steps", sources, *EMULATED, "-O0", "-fsanitize=address")
    for num_ranks, hidden, topk in ((1, 128, 4), (2, 384, 9)):
        recv_format, wire = random.randrange(3), random.randrange(3)
        compare(program, recv_format, wire, num_ranks, hidden, topk, ctas=3)


def compare(program: Path, *sizes: int, ctas: int) -> None:
    seed = random.randrange(1 << 31)
    arguments = [str(n) for n in (*sizes, ctas, seed)]
    # The sanitizer's own stacks would not be those of the fibres.
    env = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=100, env=env
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert done.stdout == "the kernels' steps and the host backend agree\n"
