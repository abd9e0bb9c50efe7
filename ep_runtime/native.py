"""The one place that imports the native module, and says what to do where it is missing."""

from __future__ import annotations

from pathlib import Path

from ep_runtime.errors import BuildError

_PARENT = Path(__file__).resolve().parents[1]

try:
    from ep_runtime import _C
except ImportError as error:
    _remedy = "build it for this Python with `pip install -e .`, or install the package"
    if (_PARENT / "setup.py").exists():
        _remedy = (
            f"{_PARENT}: this is the source tree, not the installed package: leave this folder, or"
            " pip install -e ."
        )
    raise BuildError(
        f"the native module ep_runtime._C cannot be imported ({error}); {_remedy}"
    ) from error

__all__ = ["_C"]
