"""The package loads without its native module, and says what to do where that is needed."""

from __future__ import annotations

import subprocess
import sys

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


def test_every_public_name_loads() -> None:
    for name in ep_runtime.__all__:
        assert getattr(ep_runtime, name) is not None
    assert set(ep_runtime.__all__) <= set(dir(ep_runtime))
    with pytest.raises(AttributeError, match="Bufer"):
        _ = ep_runtime.Bufer  # type: ignore[attr-defined]
