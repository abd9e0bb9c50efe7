"""The one place that imports the native module, and says what to do where it is missing."""

from __future__ import annotations

from ep_runtime.errors import BuildError

try:
    from ep_runtime import _C
except ImportError as error:
    raise BuildError(
        f"the native module ep_runtime._C cannot be imported ({error}); build it for this Python"
        " with `pip install -e .` or `python setup.py build_ext --inplace`"
    ) from error

__all__ = ["_C"]
