"""Compiling C++ test programs with the machine's own compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
HOST_STEPS = ("combine", "dispatch_recv", "dispatch_send", "faults", "host_rank", "waiter")
NORMAL_STEPS = ("normal_rank", "normal_dispatch", "normal_combine", "faults", "waiter", "row_math")


def compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (g++ or c++) on PATH")
    return found


def host_sources(*names: str) -> list[Path]:
    return [CSRC / "host" / f"{name}.cpp" for name in names]


def build(target: Path, sources: list[Path], *flags: str) -> Path:
    """Compile and link `sources` to `target`; warnings are errors."""
    command = [compiler(), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    command += [f"-I{CSRC}", f"-I{HERE}", *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return target
