"""Makes `import deep_ep` mean this implementation, in this process and those it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from ep_runtime import env
from ep_runtime.errors import SequenceError

DIRECTORY = str(Path(__file__).resolve().parent / "importable")
NAMES = ("deep_ep", "deep_ep_cpp")


class _Finder:
    """Looks the names up in DIRECTORY before any other finder, whatever sys.path says later."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path  # of the parent package: names with one are found by the ordinary finder
        return PathFinder.find_spec(name, [DIRECTORY], target) if name in NAMES else None


def install() -> None:
    """Let `deep_ep` and `deep_ep_cpp` be imported from here, ahead of any installed ones.

    Call it before anything imports deep_ep; again does nothing. Processes that multiprocessing
    spawns inherit it. Raises SequenceError if another deep_ep was imported before.
    """
    for name in NAMES:
        module = sys.modules.get(name)
        origin = getattr(module, "__file__", None) or ""
        if module is not None and not origin.startswith(DIRECTORY):
            raise SequenceError(
                f"{name} was already imported from {origin or 'elsewhere'}: call install() before"
                " the first import of it, or start the program with"
                " python -m ep_runtime.integrations.deep_ep"
            )
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    # multiprocessing hands sys.path, but not sys.meta_path, to the processes that it spawns.
    if DIRECTORY not in sys.path:
        sys.path.insert(0, DIRECTORY)


def install_for_children() -> None:
    """Let Python programs that this process starts import it too (through PYTHONPATH)."""
    env.prepend_path("PYTHONPATH", DIRECTORY)
