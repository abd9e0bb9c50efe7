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
    here = Path(__file__).resolve()
    if not _git(here.parent, "ls-files", here.name):  # installed inside someone else's checkout
        return "unknown"
    # A hash, whatever tags there are.
    describe = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return _git(here.parent, *describe) or "unknown"


def _git(directory: Path, *arguments: str) -> str:
    """What git prints, or "" where it fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(text: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
