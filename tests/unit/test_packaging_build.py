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

from ep_runtime.native import _C

CHECKOUT = Path(__file__).resolve().parents[2]
CHOICES = ("EP_NVCC", "EP_NO_CUDA", "EP_CUDA_ARCHS", "CUDA_HOME", "CXXFLAGS", "MAX_JOBS")

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


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_number_of_jobs_that_is_none_is_one_line(project: Path, text: str) -> None:
    done = build(project, EP_NO_CUDA="1", MAX_JOBS=text)
    assert done.returncode != 0
    assert f"ep_runtime: MAX_JOBS={text!r}: give a whole number of 1 or more" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_is_one_line(project: Path) -> None:
    done = build(project, EP_NO_CUDA="1", CXX="no-such-c++ -pipe")
    assert done.returncode != 0
    assert "no program 'no-such-c++'; install a C++20 compiler or set CXX" in done.stderr
    assert "Traceback" not in done.stderr


def test_sources_that_are_not_whole_are_one_line(project: Path) -> None:
    shutil.rmtree(project / "csrc")
    done = build(project, EP_NO_CUDA="1")
    assert done.returncode != 0
    assert "csrc/bindings.cpp is not there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reason_with_quotes_reaches_the_module(project: Path) -> None:
    script = project / "setup.py"
    text = script.read_text()
    assert '"EP_NO_CUDA is set"' in text
    script.write_text(text.replace('"EP_NO_CUDA is set"', repr('a "quoted" \\ reason')))
    assert build(project, EP_NO_CUDA="1").returncode == 0
    assert ask(project, "c.build_info") == 'a "quoted" \\ reason'


@pytest.mark.slow
@pytest.mark.skipif(not _C.has_cuda, reason="what the tests use was built so")
def test_the_real_sources_hold_together_without_cuda(project: Path) -> None:
    shutil.rmtree(project / "csrc")
    shutil.copytree(CHECKOUT / "csrc", project / "csrc")
    done = build(project, EP_NO_CUDA="1", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert ask(project, "c.has_cuda, repr(c.cuda_archs), hasattr(c, 'HostRank')") == "False '' True"


# ---- finding nvcc -------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, in an environment where nothing is set and PATH is empty."""
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
    return script


@pytest.fixture
def find_cuda(script: Any) -> Callable[[], tuple[Any, str]]:
    """setup.py's own search."""

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


def broken_nvcc(directory: Path, body: str, interpreter: str = "/bin/sh") -> Path:
    directory.mkdir()
    nvcc = directory / "nvcc"
    nvcc.write_text(f"#!{interpreter}\n{body}\n")
    nvcc.chmod(0o755)
    return nvcc


BROKEN = [
    ("echo no licence >&2; exit 3", "/bin/sh", "status 3 from --version: no licence"),
    ("exit 0", "/bin/sh", "it does not answer like nvcc"),
    ("", "/nowhere/sh", "No such file"),
]


@pytest.mark.parametrize(("body", "interpreter", "why"), BROKEN)
def test_a_broken_compiler_that_nobody_named_is_passed_over(
    find_cuda: Finder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    interpreter: str,
    why: str,
) -> None:
    nvcc = broken_nvcc(tmp_path / "broken", body, interpreter)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    cuda, reason = find_cuda()
    assert cuda is None
    assert f"nvcc from PATH ({nvcc}) does not work: " in reason
    assert why in reason
    assert reason in capsys.readouterr().err


def test_after_a_broken_compiler_comes_the_pip_toolkit(
    script: Any, find_cuda: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = broken_nvcc(tmp_path / "broken", "exit 1").parent
    monkeypatch.setenv("PATH", f"{on_path}:/usr/bin:/bin")
    wheel = fake_nvcc(tmp_path / "wheel", "13.1").parent
    monkeypatch.setattr(script, "find_wheel_directory", lambda *_: wheel)
    cuda, reason = find_cuda()
    assert cuda.version == "13.1.88"
    assert "from pip CUDA toolkit" in reason


@pytest.mark.parametrize(("body", "interpreter", "why"), BROKEN)
def test_a_broken_compiler_that_was_named_ends_the_build(
    find_cuda: Finder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    interpreter: str,
    why: str,
) -> None:
    nvcc = broken_nvcc(tmp_path / "bin", body, interpreter)
    for name, value in (("CUDA_HOME", tmp_path), ("EP_NVCC", nvcc)):
        monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match=f"(?s){name} says {nvcc}, .*{why}") as ended:
            find_cuda()
        assert "set EP_NVCC or EP_NO_CUDA=1" in str(ended.value)


@pytest.mark.parametrize("text", ["sm_90", "9.0", "90;80", "90b", "1000", ";"])
def test_architectures_that_are_none_are_one_line(
    find_cuda: Finder, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("EP_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match=f"EP_CUDA_ARCHS='{text}' .*numbers of 90 or more") as told:
        find_cuda()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("editable", [False, True])
def test_what_an_earlier_build_left_is_not_packed(
    script: Any, tmp_path: Path, editable: bool
) -> None:
    source, packed = tmp_path / "source", tmp_path / "lib" / "ep_runtime"
    source.mkdir()
    (source / "__init__.py").touch()
    packed.mkdir(parents=True)
    (packed / "removed.py").touch()
    given = {"packages": ["ep_runtime"], "package_dir": {"ep_runtime": str(source)}}
    given["script_name"] = "setup.py"
    command = script.BuildPython(setuptools.Distribution(given))
    command.build_lib, command.editable_mode = str(packed.parent), editable
    command.ensure_finalized()
    command.run()
    held = sorted(path.name for path in packed.iterdir())
    assert held == (["removed.py"] if editable else ["__init__.py"])


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
