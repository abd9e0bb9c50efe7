"""What makes the checkout's environment, .ci/make_venv.py: which Python it takes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "make_venv.py"


def test_an_old_python_is_told_how_to_name_another() -> None:
    require = runpy.run_path(str(SCRIPT))["require_python"]
    require((3, 10))
    require(tuple(sys.version_info[:2]))
    with pytest.raises(SystemExit, match="Python 3.9, and 3.10 .*make PYTHON=python3.12"):
        require((3, 9))
