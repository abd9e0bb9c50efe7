"""Four ranks as threads under ThreadSanitizer, and under Address- and UndefinedBehaviorSanitizer.

The program checks every row and every sum itself (host_threads.cpp); here it must end clean.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from native_build import HERE, HOST_STEPS, build, host_sources, require_sanitizer

SANITIZERS = {"thread": "thread", "address": "address,undefined"}
STEPS = 300

pytestmark = pytest.mark.slow


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if "unexpected memory mapping" in done.stderr:  # more address randomisation than it can take
        command = ["setarch", "--addr-no-randomize", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = SANITIZERS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    require_sanitizer(flags, directory)
    sources = [HERE / "host_threads.cpp", *host_sources(*HOST_STEPS, "row_math")]
    sanitize = ["-O1", "-g", f"-fsanitize={flags}", "-fno-sanitize-recover=all"]
    return build(directory / "host_threads", sources, *sanitize)


@pytest.mark.parametrize("wire", [0, 1, 2], ids=["bf16", "fp8", "opaque"])
@pytest.mark.parametrize("recv_format", [0, 1, 2], ids=["batched", "contiguous", "compact"])
def test_threads_move_every_row_and_the_sanitizer_is_silent(
    program: Path, recv_format: int, wire: int
) -> None:
    done = run(program, str(recv_format), str(wire), str(STEPS))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all rows and sums are right\n"
    assert done.stderr == ""
