"""What a record says about where it was made."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

from ep_runtime.bench.records import Machine


def describe(device: torch.device, command: str, commit: str | None, environment: str) -> Machine:
    """This machine, this checkout. `commit` None: asked of git."""
    cuda = device.type == "cuda"
    nccl = torch.cuda.nccl.version() if cuda else ()  # type: ignore[no-untyped-call]
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        backend="cuda" if cuda else "host",
        commit=commit or git_commit(),
        command=command,
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        nccl=".".join(map(str, nccl)) or "none",
        environment=environment if cuda else "",
    )


def git_commit() -> str:
    """The checkout's commit, "-dirty" behind it if tracked files differ; else "unknown"."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    command += ["--exclude=*"]  # a hash, whatever tags there are
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def slug(text: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
