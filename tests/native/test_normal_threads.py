"""Normal operations of four ranks as threads under the sanitizers.

The program checks every row, every sum and every fault itself (normal_threads.cpp).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from native_build import HERE, NORMAL_STEPS, build, host_sources, require_sanitizer
from test_native_threads import SANITIZERS, run

STEPS = 300

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_threads_move_every_row_and_the_sanitizer_is_silent(sanitizer: str, tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    require_sanitizer(flags, tmp_path)
    sources = [HERE / "normal_threads.cpp", *host_sources(*NORMAL_STEPS)]
    sanitize = ["-O1", "-g", f"-fsanitize={flags}", "-fno-sanitize-recover=all"]
    done = run(build(tmp_path / "normal_threads", sources, *sanitize), str(STEPS))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all rows and sums are right\n"
    assert done.stderr == ""
