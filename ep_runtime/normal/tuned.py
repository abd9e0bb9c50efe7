"""How many SMs the operations use where nobody says: measured on this machine, or a default.

`ep-runtime tune` measures and writes; buffers read when they are built. The file is JSON:
{"<GPU name>": {"<ranks>": {"dispatch": SMs, "combine": SMs}}}, in EP_TUNED or else under
~/.cache/ep_runtime. Without a file, or an entry for this GPU and number of ranks, the default is
used; also where EP_TUNED is not set and there is no way to the cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ep_runtime import env
from ep_runtime.errors import ConfigError

DEFAULT_SMS = 24
FILE_NAME = "tuned.json"


@dataclass(frozen=True, slots=True)
class TunedSms:
    """Most SMs of each operation."""

    dispatch: int = DEFAULT_SMS
    combine: int = DEFAULT_SMS


def tuned_path() -> Path:
    """EP_TUNED, or the file in the user's cache."""
    named = env.read().tuned
    return Path(named) if named else Path.home() / ".cache" / "ep_runtime" / FILE_NAME


def tuned_num_sms(
    num_ranks: int, device: torch.device | None = None, default: TunedSms | None = None
) -> TunedSms:
    """What was measured for this GPU (None: the current one) and number of ranks, or else
    `default` (None: TunedSms()). Raises ConfigError for a file that cannot be read."""
    default = TunedSms() if default is None else default
    if not torch.cuda.is_available() or (device is not None and device.type == "cpu"):
        return default
    try:
        path = tuned_path()
    except RuntimeError:  # this user has no home directory, and named no file
        return default
    entries = _read(path, named=bool(env.read().tuned))
    entry = entries.get(torch.cuda.get_device_name(device), {}).get(str(num_ranks))
    if entry is None:
        return default
    try:
        sms = TunedSms(int(entry["dispatch"]), int(entry["combine"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if min(sms.dispatch, sms.combine) < 1:
        raise _damaged(path, f"{entry}: it takes at least 1 SM")
    return sms


def write_tuned(path: Path, device_name: str, num_ranks: int, sms: TunedSms) -> None:
    """Put one entry into the file, whole or not at all; other entries stay, those of processes
    that write at the same time too (a lock lies beside it, and is left there)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        entries = _read(path)
        entries.setdefault(device_name, {})[str(num_ranks)] = asdict(sms)
        _replace(path, json.dumps(entries, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Under a name of its own first: readers take no lock, and not every writer may be held by
    it (some network file systems have none between hosts)."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, *, named: bool = True) -> dict[str, dict[str, Any]]:
    """named: somebody asked for this file, so it is an error if there is no way to it."""
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not named:
            return {}
        raise _damaged(path, error) from error
    if not isinstance(entries, dict) or not all(isinstance(v, dict) for v in entries.values()):
        raise _damaged(path, "not an object of objects")
    return entries


def _damaged(path: Path, error: object) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used ({error}); delete it, run `ep-runtime tune` again, or set"
        f" {env.variable('tuned')} to another file"
    )
