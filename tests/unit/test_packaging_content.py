"""What is in the package: every part is listed, the native modules depend on nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

from ep_runtime import _C

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setenv("EP_NO_CUDA", "1")
    runpy.run_path(str(CHECKOUT / "setup.py"))
    return given


def test_every_directory_with_modules_is_listed(listed: dict[str, Any]) -> None:
    found = set()
    for package, directory in listed["package_dir"].items():
        for file in (CHECKOUT / directory).rglob("*.py"):
            inside = file.parent.relative_to(CHECKOUT / directory).parts
            found.add(".".join([package, *inside]))
    assert set(listed["packages"]) == found


def test_every_listed_package_has_an_init(listed: dict[str, Any]) -> None:
    for package in listed["packages"]:
        mapped = max(
            (p for p in listed["package_dir"] if f"{package}.".startswith(f"{p}.")), key=len
        )
        rest = package.removeprefix(mapped).strip(".").split(".")
        directory = CHECKOUT.joinpath(listed["package_dir"][mapped], *rest)
        assert (directory / "__init__.py").exists(), f"{package}: no __init__.py in {directory}"


def test_listed_data_is_there(listed: dict[str, Any]) -> None:
    for package, patterns in listed["package_data"].items():
        directory = CHECKOUT.joinpath(*package.split("."))
        for pattern in patterns:
            assert list(directory.glob(pattern)), f"{directory} has no {pattern}"


def test_version_is_the_same_everywhere() -> None:
    import ep_runtime

    project = (CHECKOUT / "pyproject.toml").read_text()
    assert f'version = "{ep_runtime.__version__}"' in project
    assert f"## [{ep_runtime.__version__}]" in (CHECKOUT / "CHANGELOG.md").read_text()


def needed(library: str) -> set[str]:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    text = subprocess.check_output(["readelf", "-d", library], text=True)
    return set(re.findall(r"NEEDED.*\[(.+)\]", text))


def test_the_native_module_needs_no_cuda_library_and_no_torch() -> None:
    allowed = ("libstdc++", "libgcc_s", "libc", "libm", "ld-linux", "libpthread", "librt", "libdl")
    heavy = {name for name in needed(str(_C.__file__)) if not name.startswith(allowed)}
    assert heavy == set()


def test_the_nvshmem_module_names_only_the_host_library() -> None:
    spec = importlib.util.find_spec("ep_runtime._nvshmem")
    if spec is None:
        pytest.skip("ep_runtime._nvshmem was not built (no nvcc, or no nvidia-nvshmem-cu13)")
    assert spec.origin is not None
    nvidia = {n for n in needed(spec.origin) if "nv" in n or "cuda" in n}
    assert nvidia == {"libnvshmem_host.so.3"}
    text = subprocess.check_output(["readelf", "-d", spec.origin], text=True)
    assert "$ORIGIN/../nvidia/nvshmem/lib" in text


def test_native_modules_import_before_torch_and_without_a_driver() -> None:
    code = "import sys, ep_runtime._C as c; print(c.has_cuda, 'torch' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/")
    assert out.split() == [str(_C.has_cuda), "False"]


def test_an_sdist_holds_all_sources_and_nothing_built(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        pytest.skip("this is no git checkout")
    tracked = subprocess.check_output(["git", "ls-files"], cwd=CHECKOUT, text=True).splitlines()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=CHECKOUT,
        env={**os.environ, "EP_NO_CUDA": "1"},
        check=True,
    )
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    held = set(sources.read_text().splitlines())
    wanted = {n for n in tracked if not n.startswith("benchmarks/results/") and n != ".gitignore"}
    assert any(name.startswith("csrc/cuda/") for name in wanted)
    present = {name for name in wanted if (CHECKOUT / name).exists()}
    assert present - held == set()
    assert [name for name in held if re.search(r"\.(o|so|a|pyc)$|__pycache__", name)] == []


@pytest.mark.slow
def test_a_wheel_holds_all_parts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("ep_runtime", "graphs", "integrations"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
    (source / "csrc").mkdir()
    (source / "csrc" / "bindings.cpp").write_text("int nothing;\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    wheels = tmp_path / "wheels"
    surroundings = {**os.environ, "EP_NO_CUDA": "1"}
    subprocess.run([*command, "-w", str(wheels), str(source)], check=True, env=surroundings)
    (wheel,) = wheels.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("graphs/__init__.py", "integrations/__init__.py", "py.typed", "_C.pyi", "cli.py"):
        assert f"ep_runtime/{name}" in names
    assert any(re.fullmatch(r"ep_runtime/_C\..*\.so", name) for name in names)
    assert "ep_runtime/lm/checkpoint.safetensors" in names
    assert not any(name.startswith(("csrc/", "tests/", "graphs/")) for name in names)
