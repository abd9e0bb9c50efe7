"""setup.py on small sources: what it finds, what it builds and says, what it compiles again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

CHECKOUT = Path(__file__).resolve().parents[2]
CHOICES = ("EP_NVCC", "EP_NO_CUDA", "EP_CUDA_ARCHS", "CUDA_HOME", "CXXFLAGS")

BINDINGS = """
#include <Python.h>
#include "answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() {
    PyObject* m = PyModule_Create(&definition);
    PyModule_AddStringConstant(m, "archs", EP_CUDA_ARCHS);
    PyModule_AddStringConstant(m, "build_info", EP_BUILD_INFO);
    PyModule_AddIntConstant(m, "answer", kAnswer);
    return m;
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with setup.py and native sources of a few lines; no packages."""
    (tmp_path / "csrc" / "host").mkdir(parents=True)
    for name in ("bench/peers", "graphs", "lm", "memory", "scheduler"):
        (tmp_path / "ep_runtime" / name).mkdir(parents=True)
    (tmp_path / "graphs").mkdir()
    (tmp_path / "integrations").mkdir()
    (tmp_path / "ep_runtime" / "__init__.py").touch()
    shutil.copy(CHECKOUT / "setup.py", tmp_path)
    (tmp_path / "csrc" / "answer.h").write_text("inline constexpr int kAnswer = 1;\n")
    (tmp_path / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (tmp_path / "csrc" / "host" / "other.cpp").write_text("int other() { return 0; }\n")
    return tmp_path


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return kept | extra


def build(project: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=project, env=environment(**extra), capture_output=True, text=True
    )


def ask(project: Path, expression: str) -> str:
    code = f"import ep_runtime._C as c; print({expression})"
    return subprocess.check_output([sys.executable, "-c", code], cwd=project, text=True).strip()


def test_without_cuda_the_host_backend_is_built_and_the_reason_is_said(project: Path) -> None:
    done = build(project, EP_NO_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "built ep_runtime._C: host backend; EP_NO_CUDA is set" in done.stderr
    assert "no ep_runtime._nvshmem: EP_NO_CUDA is set" in done.stderr
    assert ask(project, "c.archs == '', c.build_info, c.answer") == "True EP_NO_CUDA is set 1"


def test_only_what_reads_a_changed_file_is_compiled_again(project: Path) -> None:
    assert build(project, EP_NO_CUDA="1").returncode == 0
    assert "compiling" not in build(project, EP_NO_CUDA="1").stderr
    (project / "csrc" / "answer.h").write_text("inline constexpr int kAnswer = 2;\n")
    done = build(project, EP_NO_CUDA="1")
    assert "compiling csrc/bindings.cpp" in done.stderr
    assert "other.cpp" not in done.stderr
    assert ask(project, "c.answer") == "2"


def test_other_flags_make_other_objects(project: Path) -> None:
    assert build(project, EP_NO_CUDA="1").returncode == 0
    done = build(project, EP_NO_CUDA="1", CXXFLAGS="-DEXTRA")
    assert "compiling csrc/host/other.cpp" in done.stderr


def test_a_compile_error_fails_the_build_and_shows_the_command(project: Path) -> None:
    (project / "csrc" / "host" / "other.cpp").write_text("int other( { }\n")
    done = build(project, EP_NO_CUDA="1")
    assert done.returncode != 0
    assert "other.cpp" in done.stderr
    assert "-std=c++20" in done.stderr


@pytest.mark.slow
def test_the_real_sources_hold_together_without_cuda(project: Path) -> None:
    shutil.rmtree(project / "csrc")
    shutil.copytree(CHECKOUT / "csrc", project / "csrc")
    done = build(project, EP_NO_CUDA="1", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert ask(project, "c.has_cuda, repr(c.cuda_archs), hasattr(c, 'HostRank')") == "False '' True"


# ---- finding nvcc -------------------------------------------------------------------------------


@pytest.fixture
def find_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Any, str]]:
    """setup.py's own search, in an environment where nothing is set and PATH is empty."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    spec = importlib.util.spec_from_file_location("ep_setup", CHECKOUT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ep_setup", script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "find_wheel_directory", lambda *_: None)

    def search() -> tuple[Any, str]:
        script.find_cuda.cache_clear()
        found: tuple[Any, str] = script.find_cuda()
        return found

    return search


Finder = Callable[[], tuple[Any, str]]


def fake_nvcc(directory: Path, version: str) -> Path:
    """A program that answers as nvcc does when asked for its version and its folders."""
    (directory / "bin").mkdir(parents=True)
    (directory / "include").mkdir()
    (directory / "lib64").mkdir()
    (directory / "include" / "cuda_runtime.h").touch()
    (directory / "lib64" / "libcudart_static.a").touch()
    nvcc = directory / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "release {version}, V{version}.88"\n'
        f'else echo "#$ TOP={directory}/bin/.." >&2; fi\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_no_compiler_anywhere_says_where_it_looked(find_cuda: Finder) -> None:
    cuda, reason = find_cuda()
    assert cuda is None
    assert reason == "no nvcc in EP_NVCC, CUDA_HOME, PATH or the pip CUDA toolkit"


def test_the_more_explicit_choice_wins(
    find_cuda: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    on_path = fake_nvcc(tmp_path / "path", "12.1").parent
    monkeypatch.setenv("PATH", f"{on_path}:/usr/bin:/bin")
    found.append(find_cuda()[0].version)
    fake_nvcc(tmp_path / "home", "12.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found.append(find_cuda()[0].version)
    monkeypatch.setenv("EP_NVCC", str(fake_nvcc(tmp_path / "chosen", "12.3")))
    cuda, reason = find_cuda()
    found.append(cuda.version)
    assert found == ["12.1.88", "12.2.88", "12.3.88"]
    assert "from EP_NVCC" in reason
    assert cuda.include == [str(tmp_path / "chosen" / "include")]
    assert cuda.libraries == [str(tmp_path / "chosen" / "lib64")]


@pytest.mark.parametrize("name", ["EP_NVCC", "CUDA_HOME"])
def test_a_compiler_that_was_named_must_exist(
    find_cuda: Finder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/nowhere/at/all")
    with pytest.raises(SystemExit, match=f"{name} says /nowhere/at/all"):
        find_cuda()


def test_architectures_get_their_code_and_the_last_one_its_ptx(
    find_cuda: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("EP_NVCC", str(fake_nvcc(tmp_path / "cuda", "13.0")))
    monkeypatch.setenv("EP_CUDA_ARCHS", "90;100")
    assert find_cuda()[0].gencode == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
