"""The README's example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(README.read_text().split("```python\n")[1].split("```")[0])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([5, 1024])\n"
