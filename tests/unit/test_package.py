"""The package loads without its native module, and says what to do where that is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ep_runtime


def run_without_native(code: str) -> subprocess.CompletedProcess[str]:
    hide = "import sys; sys.modules['ep_runtime._C'] = None; "
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False
    )


def test_package_loads_without_the_native_module() -> None:
    ran = run_without_native(
        "import ep_runtime; print(ep_runtime.__version__); from ep_runtime import PeerTimeout"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ep_runtime.__version__


def test_missing_native_module_says_how_to_build_it() -> None:
    ran = run_without_native("from ep_runtime import Buffer")
    assert ran.returncode != 0
    assert "BuildError" in ran.stderr
    assert "pip install -e ." in ran.stderr


def test_the_source_tree_says_that_it_is_not_the_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "ep_runtime"
    package.mkdir()
    for name in ("__init__.py", "errors.py", "native.py"):
        shutil.copy(Path(ep_runtime.__file__).with_name(name), package)
    code = "import sys; sys.modules['ep_runtime._C'] = None; import ep_runtime.native"
    for told in (False, True):
        if told:
            (tmp_path / "setup.py").touch()
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert "BuildError: the native module" in ran.stderr
        why = f"{tmp_path}: this is the source tree, not the installed package: leave this folder"
        assert (why in ran.stderr) == told
        assert "pip install -e ." in ran.stderr


def test_every_public_name_loads() -> None:
    for name in ep_runtime.__all__:
        assert getattr(ep_runtime, name) is not None
    assert set(ep_runtime.__all__) <= set(dir(ep_runtime))
    with pytest.raises(AttributeError, match="Bufer"):
        _ = ep_runtime.Bufer  # type: ignore[attr-defined]
