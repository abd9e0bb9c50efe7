"""Imports go one way, and the package loads without its native module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ep_runtime

PACKAGE = Path(ep_runtime.__file__).parent

# Each part may import those before it.
LAYERS = [
    ["_C", "_nvshmem", "errors"],
    ["env", "native"],
    ["config"],
    ["world"],
    ["memory"],
    ["layout"],
    ["reference", "handles", "faults", "pending", "order"],
    ["ops", "validate"],
    ["connect", "rank"],
    ["buffer"],
    ["virtual", "launch"],
    ["graphs"],
    ["scheduler"],
    ["lm", "bench", "integrations", "doctor"],
    ["decoding"],
    ["cli", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of ep_runtime that a file imports when it is loaded."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "ep_runtime":
            names = [f"ep_runtime.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        parts |= {n.split(".")[1] for n in names if n.startswith("ep_runtime.")}
    return {_home(part) for part in parts}


def _home(part: str) -> str:
    """The part that a public name or a helper of the command line belongs to."""
    return "cli" if part.startswith("cli_") else ep_runtime._HOME.get(part, part)


def source_files() -> list[tuple[str, Path]]:
    """(part, file) of everything in the package, graphs/ and integrations/ beside it included."""
    roots = [(PACKAGE, "")]
    roots += [(PACKAGE.parent / name, name) for name in ("graphs", "integrations")]
    found = []
    for root, name in roots:
        for path in sorted(root.rglob("*.py")):
            part = name or _home(path.relative_to(root).parts[0].removesuffix(".py"))
            if part != "__init__":
                found.append((part, path))
    return found


@pytest.mark.parametrize(
    ("part", "path"), source_files(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_go_one_way(part: str, path: Path) -> None:
    assert part in LEVEL, f"{path}: say in LAYERS where {part} belongs"
    for other in imported_parts(path) - {part, "__version__"}:
        assert other in LEVEL, f"{path} imports {other}, which no layer names"
        assert LEVEL[other] <= LEVEL[part], f"{path}: {part} must not import {other}"


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
