"""The CUDA steps of the normal operations without a GPU, beside the host backend: the same bytes.

As test_kernel_steps.py: every CUDA thread is a fibre, bulk copies happen at once; memory order is
for runs on GPUs.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from native_build import EMULATED, HERE, NORMAL_STEPS, build, host_sources

AGREE = "the kernels' steps and the host backend agree\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [HERE / "normal_steps.cpp", *host_sources(*NORMAL_STEPS)]
    return build(tmp_path_factory.mktemp("normal") / "normal_steps", sources, *EMULATED)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "row_bytes", "num_scales", "topk", "tokens", "ctas"),
    [
        pytest.param(1, 4, 1024, 8, 2, 7, 2, id="one rank"),
        pytest.param(2, 8, 512, 2, 4, 9, 3, id="two ranks, scales"),
        pytest.param(3, 6, 256, 0, 9, 20, 4, id="three ranks, more than eight choices"),
        pytest.param(5, 10, 256, 1, 32, 7, 3, id="five ranks, most choices"),
        pytest.param(6, 72, 256, 0, 72, 7, 2, id="an entry for each of most ranks"),
        pytest.param(2, 8, 16384, 3, 4, 5, 2, id="rows in several pieces"),
        pytest.param(2, 8, 512, 4, 4, 9, 20, id="scales four at a time, two senders a CTA"),
        pytest.param(2, 8, 1024, 0, 4, 40, 66, id="one sender a CTA"),
        pytest.param(2, 4, 256, 0, 2, 4000, 2, id="more rows than a combine has chunks"),
    ],
)
def test_steps_give_the_host_backends_bytes(
    program: Path,
    num_ranks: int,
    num_experts: int,
    row_bytes: int,
    num_scales: int,
    topk: int,
    tokens: int,
    ctas: int,
) -> None:
    sizes = (num_ranks, num_experts, row_bytes, num_scales, topk, tokens, ctas, ctas, ctas)
    assert run(program, sizes) == AGREE


@pytest.mark.parametrize(
    ("num_ranks", "row_bytes", "tokens", "as_of", "others"),
    [
        pytest.param(3, 14336, 30, 32, 32, id="packed by four warps a CTA"),
        pytest.param(2, 32768, 40, 64, 64, id="packed by two warps a CTA"),
        pytest.param(4, 2048, 40, 112, 112, id="packed by one warp a CTA"),
        pytest.param(2, 2048, 3500, 32, 32, id="chunks of several rows, packed or not"),
        pytest.param(3, 14336, 30, 3, 32, id="a rank that does not pack"),
        pytest.param(3, 32768, 30, 32, 3, id="a rank that packs"),
    ],
)
def test_packed_rows_add_up_to_the_same_bytes(
    program: Path, num_ranks: int, row_bytes: int, tokens: int, as_of: int, others: int
) -> None:
    sizes = (num_ranks, 2 * num_ranks, row_bytes, 0, 3, tokens, 3, as_of, others)
    said = run(program, sizes)
    assert said.startswith(AGREE)
    packed, raw = map(int, said.removeprefix(AGREE).split())
    assert packed > 0
    assert raw > 0


@pytest.mark.parametrize(
    ("num_ranks", "row_bytes", "tokens", "as_of"),
    [
        pytest.param(3, 256, 20, 1, id="few ranks"),
        pytest.param(34, 2048, 3, 32, id="two ranks to a lane, packed"),
        pytest.param(72, 256, 1, 1, id="most ranks"),
    ],
)
def test_tokens_go_to_all_ranks_along_a_layout(
    program: Path, num_ranks: int, row_bytes: int, tokens: int, as_of: int
) -> None:
    """More rows of a token come home than it can have choices."""
    sizes = (num_ranks, num_ranks, row_bytes, 2, 3, tokens, 1, as_of, as_of)
    assert run(program, sizes, everywhere=True).startswith(AGREE)


def run(program: Path, sizes: tuple[int, ...], *, everywhere: bool = False) -> str:
    seed = random.randrange(1 << 31)
    done = subprocess.run(
        [str(program), *map(str, (*sizes, int(everywhere), seed))],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    return done.stdout
