"""Compiling C++ test programs with the machine's own compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
HOST_STEPS = ("combine", "dispatch_recv", "dispatch_send", "faults", "host_rank", "waiter")
NORMAL_STEPS = ("normal_rank", "normal_dispatch", "normal_combine", "faults", "waiter", "row_math")

# Device code on the CPU. The emulator stands before csrc on the include path, so that its ptx.cuh
# is found first. A GPU faults where a vector is not aligned; so does this. Fibres jump between
# stacks, which a fortified longjmp() takes for an error.
EMULATED = ["-O1", "-U_FORTIFY_SOURCE", f"-I{HERE / 'emulator'}", "-Wno-unknown-pragmas"]
EMULATED += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]


def compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (g++ or c++) on PATH")
    return found


def require_sanitizer(flags: str, directory: Path) -> None:
    """Skip where the compiler lacks the sanitizer's run-time library."""
    source = directory / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [compiler(), f"-fsanitize={flags}", str(source), "-o", str(directory / "nothing")]
    if subprocess.run(command, capture_output=True, timeout=60).returncode != 0:
        pytest.skip(
            f"{compiler()} cannot link -fsanitize={flags}; install libtsan, libasan, libubsan"
        )


def host_sources(*names: str) -> list[Path]:
    return [CSRC / "host" / f"{name}.cpp" for name in names]


def build(target: Path, sources: list[Path], *flags: str) -> Path:
    """Compile `sources`, as many at once as there are cores, and link them to `target`."""
    command = [compiler(), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    command += [f"-I{CSRC}", f"-I{HERE}"]

    def compiled(source: Path) -> str:
        made = str(target.with_name(f"{target.name}-{source.stem}.o"))
        _run([*command, "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    _run([*command, *objects, "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    """Warnings are errors."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
