"""vLLM's plugin loader finds us, and to be found changes nothing until it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOAD = """
import importlib.util, sys
from importlib.metadata import entry_points
(ours,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "ep_runtime"]
load = ours.load()
load()
load()  # vLLM loads plugins again in its other processes, and in some twice
spec = importlib.util.find_spec("deep_ep")
print("ours" if spec and spec.origin and "ep_runtime" in open(spec.origin).read() else "nobody's")
"""
CHILD = """
import subprocess, sys
from ep_runtime.integrations.engines import load
load()
sys.exit(subprocess.run([sys.executable, "-c", "import deep_ep; deep_ep.Buffer"]).returncode)
"""


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "EP_AS_DEEP_EP"} | variables
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "whose"),
    [({}, "nobody's"), ({"EP_AS_DEEP_EP": "0"}, "nobody's"), ({"EP_AS_DEEP_EP": "1"}, "ours")],
)
def test_the_plugin_answers_deep_ep_where_it_is_asked_to(
    variables: dict[str, str], whose: str
) -> None:
    done = run(LOAD, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [whose]


def test_variables_that_are_not_the_plugins_do_not_end_the_engine() -> None:
    done = run(LOAD, EP_TIMEOUT_S="soon", MASTER_PORT="0", CUDA_DEVICE_MAX_CONNECTIONS="64")
    assert done.returncode == 0, done.stderr


def test_programs_that_the_process_starts_inherit_it() -> None:
    done = run(CHILD, EP_AS_DEEP_EP="1")
    assert done.returncode == 0, done.stderr


def test_a_value_that_is_no_flag_is_named() -> None:
    done = run(LOAD, EP_AS_DEEP_EP="yes")
    assert done.returncode != 0
    assert "EP_AS_DEEP_EP='yes' is not 0 or 1" in done.stderr
