"""`import deep_ep` means this package: after install(), and under the runner, whatever else is
there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = [sys.executable, "-m", "ep_runtime.integrations.deep_ep"]
NAMES = """
import importlib.util, sys
import deep_ep
from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
from deep_ep.buffer import Buffer as same_buffer
from deep_ep.utils import EventHandle as same_handle, EventOverlap as same_overlap
from deep_ep.utils import check_nvlink_connections
from deep_ep_cpp import Config as same_config, get_low_latency_rdma_size_hint, is_sm90_compiled
import ep_runtime.integrations.deep_ep as ours
import torch
assert Buffer is same_buffer is ours.Buffer and Config is same_config is ours.Config
assert EventHandle is same_handle is ours.EventHandle
assert EventOverlap is same_overlap is ours.EventOverlap
assert topk_idx_t is torch.int64
assert deep_ep.utils.check_nvlink_connections is deep_ep.buffer.check_nvlink_connections
assert check_nvlink_connections(None) is None
assert is_sm90_compiled() is Buffer.is_sm90_compiled()
sizes = 128, 7168, 8, 256
assert get_low_latency_rdma_size_hint(*sizes) == Buffer.get_low_latency_rdma_size_hint(*sizes)
for name in ("deep_ep", "deep_ep.utils", "deep_ep.buffer", "deep_ep_cpp"):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.name == name and spec.origin, name
    assert sys.modules[name].__spec__.origin == spec.origin
assert deep_ep.__spec__.submodule_search_locations
assert deep_ep.__version__.startswith("1.2.1+")
print("ours", *sys.argv[1:])
"""


@pytest.fixture
def rival(tmp_path: Path) -> Path:
    """A directory with another deep_ep."""
    package = tmp_path / "rival" / "deep_ep"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the other deep_ep')\n")
    return package.parent


def run(command: list[str], *paths: Path, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_install_wins_over_another_deep_ep(rival: Path) -> None:
    start = "from ep_runtime.integrations.deep_ep import install\ninstall(); install()\n"
    insist = f"import sys; sys.path.insert(0, {str(rival)!r})\n"  # even ahead of us
    assert run([sys.executable, "-c", start + insist + NAMES], rival).split() == ["ours"]


def test_install_comes_too_late_after_another_import(tmp_path: Path) -> None:
    package = tmp_path / "deep_ep"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = (
        "import deep_ep\n"
        "from ep_runtime.errors import SequenceError\n"
        "from ep_runtime.integrations.deep_ep import install\n"
        "try:\n    install()\nexcept SequenceError as error:\n    print(error)\n"
    )
    said = run([sys.executable, "-c", code], tmp_path)
    assert str(package) in said
    assert "python -m ep_runtime.integrations.deep_ep" in said


def test_runner_runs_a_script_with_its_arguments(rival: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 'found'\n")
    script = tmp_path / "script.py"
    script.write_text(NAMES + "from beside import VALUE\nprint(__name__, VALUE, sys.argv[0])\n")
    told = run([*RUNNER, str(script), "-x", "two"], rival, cwd=Path("/"))
    assert told.split() == ["ours", "-x", "two", "__main__", "found", str(script)]


def test_runner_runs_a_module(rival: Path, tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(NAMES)
    assert run([*RUNNER, "-m", "some_module", "--flag"], rival, tmp_path).split() == [
        "ours",
        "--flag",
    ]


def test_processes_that_the_program_starts_see_it_too(rival: Path, tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(NAMES)
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, subprocess, sys\n"
        "import deep_ep\n"
        "def child(queue):\n"
        "    import deep_ep\n"
        "    queue.put(deep_ep.Buffer.__module__)\n"
        "if __name__ == '__main__':\n"
        "    for method in ('spawn', 'fork', 'forkserver'):\n"
        "        context = multiprocessing.get_context(method)\n"
        "        queue = context.Queue()\n"
        "        process = context.Process(target=child, args=(queue,))\n"
        "        process.start()\n"
        "        print(queue.get(timeout=60))\n"
        "        process.join()\n"
        f"    subprocess.run([sys.executable, {str(tmp_path / 'names.py')!r}], check=True)\n"
    )
    told = run([*RUNNER, str(script)], rival).split()
    assert sorted(told) == ["ep_runtime.integrations.deep_ep.buffer"] * 3 + ["ours"]


def test_runner_explains_itself(tmp_path: Path) -> None:
    for arguments, said in (
        (["--what"], "usage:"),
        ([str(tmp_path / "missing.py")], "no such file"),
    ):
        done = subprocess.run([*RUNNER, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
    done = subprocess.run([*RUNNER, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "SCRIPT" in done.stdout


@pytest.mark.parametrize(
    ("name", "ranks"), [("deep_ep_training.py", 2), ("deep_ep_decoding.py", 4)]
)
def test_examples_run_unchanged(checkout: Path, name: str, ranks: int) -> None:
    script = checkout / "examples" / name
    assert "ep_runtime" not in script.read_text().partition('"""\n\n')[2]
    told = run([*RUNNER, str(script), "--ranks", str(ranks)])
    for rank in range(ranks):
        assert f"rank {rank}: " in told
