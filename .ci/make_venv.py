"""Make the virtual environment of a checkout, or leave the one that is there.

    python3 .ci/make_venv.py .venv [--torch torch==2.13.0]

Two kinds, chosen by what this machine's python3 has:

layered  python3 imports a torch that sees a GPU. The environment is a layer over that interpreter:
         what is installed there is used as it is, nothing there is changed, no network is needed.
own      Otherwise. A plain environment with a torch of its own.

Nothing outside the directory is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 10)
BUILD_TOOLS = ("setuptools", "wheel", "pybind11")
SEES_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def require_python(version: tuple[int, ...]) -> None:
    if version < OLDEST_PYTHON:
        raise SystemExit(
            f"environment: {sys.executable} is Python {'.'.join(map(str, version))}, and 3.10 or"
            " newer is needed; name one, for example: make PYTHON=python3.12"
        )


def works(python: str, code: str) -> bool:
    if not Path(python).exists():
        return False
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def make_layered(directory: Path) -> None:
    """A layer: this interpreter's packages come after the environment's own."""
    venv.create(directory, system_site_packages=True, with_pip=False, clear=directory.exists())
    python = directory / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # addsitedir, not plain lines: packages below may bring .pth files of their own.
    parents = [p for p in site.getsitepackages() if Path(p).is_dir()]
    lines = [f"import site; site.addsitedir({p!r})\n" for p in parents]
    Path(purelib, "_parent_environment.pth").write_text("".join(lines))
    if not works(str(python), "import pip"):
        subprocess.run([python, "-m", "ensurepip"], check=True)
    missing = [name for name in BUILD_TOOLS if not works(str(python), f"import {name}")]
    if missing:
        pip_install(str(python), *missing)


def make_own(directory: Path, torch: str, extra: list[str]) -> None:
    python = str(directory / "bin" / "python")
    if not works(python, "import pip"):
        try:
            venv.create(directory, with_pip=True, clear=directory.exists())
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"environment: {sys.executable} has no ensurepip; install your system's "
                "python3-venv package, or make .venv yourself (virtualenv .venv); then make again"
            ) from None
    wanted = [torch, "setuptools>=77", "wheel", "pybind11>=2.12", *extra]
    pip_install(python, *wanted)


def pip_install(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"environment: failed: {' '.join(command)}")


def main() -> None:
    require_python(tuple(sys.version_info[:2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install if there is none")
    options = parser.parse_args()
    directory: Path = options.directory
    python = str(directory / "bin" / "python")
    if works(python, "import setuptools, torch, pybind11, pip"):
        say(f"{directory} is there and has torch; kept")
        return
    if works(sys.executable, SEES_GPU):
        say(f"{directory}: a layer over {sys.executable}, whose torch sees a GPU")
        make_layered(directory)
        return
    compiles_cuda = has_gpu() or bool(os.environ.get("EP_NVCC") or shutil.which("nvcc"))
    why = "a GPU, but this python3's torch does not see it" if has_gpu() else "no NVIDIA GPU"
    say(f"{directory}: its own, with {options.torch} ({why})")
    make_own(directory, options.torch, ["cuda-bindings>=13.0,<14"] if compiles_cuda else [])
    if compiles_cuda and not works(python, "import nvidia.nvshmem"):
        # A torch for CUDA brings its own. No dependencies: nvcc has the CUDA runtime already.
        pip_install(python, "--no-deps", "nvidia-nvshmem-cu13==3.4.5")


if __name__ == "__main__":
    main()
