"""The kernel that says which nodes tokens go to, without a GPU, beside the host backend."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from native_build import EMULATED, HERE, build, host_sources


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [HERE / "node_steps.cpp", *host_sources("nodes")]
    return build(tmp_path_factory.mktemp("nodes") / "node_steps", sources, *EMULATED)


@pytest.mark.parametrize(
    ("num_nodes", "ranks_per_node", "tokens"), [(2, 2, 700), (4, 1, 33), (9, 8, 40), (1, 3, 512)]
)
def test_tables_are_the_hosts(
    program: Path, num_nodes: int, ranks_per_node: int, tokens: int
) -> None:
    seed = random.randrange(1 << 31)
    arguments = map(str, (num_nodes, ranks_per_node, tokens, seed))
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert done.stdout == "the kernel and the host agree\n"
