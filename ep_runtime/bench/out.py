"""Where results go, and which process writes and prints them."""

from __future__ import annotations

import os
from pathlib import Path

from ep_runtime import env
from ep_runtime.errors import ConfigError


def is_first() -> bool:
    """Rank 0 of torchrun's, or the process that starts all ranks; RANK alone means nothing."""
    settings = env.read()
    return not (settings.under_torchrun and settings.rank)


def make_folder(out: Path | None) -> None:
    """Make the folder of the results (None: none are written) before any rank starts.

    Raises ConfigError where it cannot be made or written to.
    """
    if out is None or not is_first():
        return
    remedy = "give --out a folder that can be written, or - for none"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be made ({error}); {remedy}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"out={str(out)!r} cannot be written to; {remedy}")
