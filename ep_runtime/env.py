"""Environment variables: all that the package reads, one documented field each.

No other module touches `os.environ`. Call `read()` where an object is built, not on a hot path, so
that a test or a launcher can change a variable between two objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ep_runtime.errors import ConfigError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MEMORY_KINDS = ("auto", "nvshmem", "ipc")
LAUNCHER = ("rank", "world_size", "master_addr", "master_port")


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    parse.__doc__ = f"a number from {low:g} to {high:g}"
    return parse


def _choice(*allowed: str, fold: Callable[[str], str] = str.lower) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = fold(text)
        if value not in allowed:
            raise ValueError(text)
        return value

    parse.__doc__ = "one of " + ", ".join(allowed)
    return parse


def _flag(text: str) -> bool:
    """0 or 1"""
    return {"0": False, "1": True}[text]


def _text(text: str) -> str:
    """a text"""
    return text


def _var(name: str, default: Any, parse: Callable[[str], Any], doc: str) -> Any:
    return field(default=default, metadata={"name": name, "parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class Env:
    """The variables, parsed and range-checked. An unset or empty variable takes its default."""

    log_level: str = _var(
        "EP_LOG_LEVEL", "WARNING", _choice(*LOG_LEVELS, fold=str.upper), "what is logged"
    )
    timeout_s: float = _var(
        "EP_TIMEOUT_S",
        10.0,
        _number(float, 0.001, 86400),
        "seconds an operation waits for a peer in steady state",
    )
    warmup_timeout_s: float = _var(
        "EP_WARMUP_TIMEOUT_S",
        60.0,
        _number(float, 0.001, 86400),
        "the same during warm-up and capture, where ranks load kernels at their own pace",
    )
    ranks_per_node: int | None = _var(
        "EP_RANKS_PER_NODE",
        None,
        _number(int, 1, 72),
        "ranks of a node, for groups of the deep_ep interface: unset, those of a host",
    )
    as_deep_ep: bool = _var(
        "EP_AS_DEEP_EP", False, _flag, "in vLLM's processes, `import deep_ep` means ep_runtime"
    )
    even_tokens: bool = _var(
        "EP_EVEN_TOKENS",
        False,
        _flag,
        "low-latency calls of the deep_ep interface: ranks mostly send equally many tokens",
    )
    own_tensors: bool = _var(
        "EP_OWN_TENSORS",
        False,
        _flag,
        "normal calls of the deep_ep interface: received rows are copied to ordinary tensors",
    )
    memory: str = _var(
        "EP_MEMORY",
        "auto",
        _choice(*MEMORY_KINDS),
        "symmetric memory of one-process-per-GPU ranks: NVSHMEM, CUDA IPC, or what works",
    )
    pdl: bool = _var(
        "EP_PDL", True, _flag, "programmatic dependent launch: a kernel starts under the previous"
    )
    num_sms: int = _var(
        "EP_NUM_SMS", 0, _number(int, 0, 1024), "SMs the kernels may use; 0 means all of them"
    )
    tuned: str | None = _var(
        "EP_TUNED", None, _text, "file of `ep-runtime tune` instead of the one in ~/.cache"
    )
    launch_timeout_s: float = _var(
        "EP_LAUNCH_TIMEOUT_S",
        600.0,
        _number(float, 1, 86400),
        "seconds after which the launcher ends all its ranks",
    )
    rank: int | None = _var(
        "RANK", None, _number(int, 0, 65535), "this process's rank (torchrun sets it)"
    )
    world_size: int | None = _var(
        "WORLD_SIZE", None, _number(int, 1, 65536), "number of ranks (torchrun sets it)"
    )
    local_rank: int | None = _var(
        "LOCAL_RANK", None, _number(int, 0, 65535), "rank on this host (torchrun sets it)"
    )
    master_addr: str | None = _var(
        "MASTER_ADDR", None, _text, "host of the rendezvous store (torchrun sets it)"
    )
    master_port: int | None = _var(
        "MASTER_PORT", None, _number(int, 1, 65535), "its port (torchrun sets it)"
    )
    cuda_device_max_connections: int | None = _var(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        None,
        _number(int, 1, 32),
        "hardware queues that streams share; 1 serialises the branches of an overlapped graph",
    )
    cuda_visible_devices: str | None = _var(
        "CUDA_VISIBLE_DEVICES", None, _text, "the GPUs this process may use"
    )
    cuda_mps_pipe_directory: str | None = _var(
        "CUDA_MPS_PIPE_DIRECTORY", None, _text, "where the MPS daemon listens, if one runs"
    )

    @property
    def under_torchrun(self) -> bool:
        """A launcher has given this process its place: rank, world size, store host and port."""
        return None not in (getattr(self, name) for name in LAUNCHER)


def variable(field_name: str) -> str:
    """The environment variable behind a field of `Env`: 'timeout_s' -> 'EP_TIMEOUT_S'."""
    name: str = Env.__dataclass_fields__[field_name].metadata["name"]
    return name


def read(environ: Mapping[str, str] | None = None) -> Env:
    """Parse the environment (by default this process's, as it is now).

    Raises ConfigError with the variable, its value and what it takes.
    """
    source = os.environ if environ is None else environ
    launched = all(source.get(variable(name), "").strip() for name in LAUNCHER)
    return Env(**{f.name: _read_one(f, source, launched) for f in fields(Env)})


def _read_one(f: Field[Any], source: Mapping[str, str], launched: bool) -> Any:
    """Without a launcher its variables are others': Kubernetes sets MASTER_PORT to an address for
    a service of that name."""
    try:
        return _parsed(f, source)
    except ConfigError:
        if launched or f.name not in (*LAUNCHER, "local_rank"):
            raise
        return None


def as_deep_ep() -> bool:
    """`Env.as_deep_ep` alone: for a process of others, whose variables must not end it."""
    value: bool = _parsed(Env.__dataclass_fields__["as_deep_ep"], os.environ)
    return value


def _parsed(f: Field[Any], source: Mapping[str, str]) -> Any:
    name, parse = f.metadata["name"], f.metadata["parse"]
    text = source.get(name, "").strip()
    if not text:
        return f.default
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise ConfigError(
            f"{name}={text!r} is not {parse.__doc__}; correct it or unset it "
            f"(default: {f.default!r})"
        ) from None


def set_default(name: str, value: str) -> str:
    """Set a variable that NVSHMEM or NCCL reads, unless the user has; the value now in force."""
    return os.environ.setdefault(name, value)


def prepend_path(name: str, directory: str) -> str:
    """Put `directory` first in a search path variable for processes started from now on."""
    rest = [entry for entry in os.environ.get(name, "").split(os.pathsep) if entry]
    if directory not in rest:
        os.environ[name] = os.pathsep.join([directory, *rest])
    return os.environ[name]


@contextmanager
def defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the user has not, for processes started inside; unset them afterwards."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def documentation() -> list[tuple[str, str, str]]:
    """(variable, default, meaning) of every field, for `ep-runtime info`."""
    return [
        (f.metadata["name"], "" if f.default is None else str(f.default), f.metadata["doc"])
        for f in fields(Env)
    ]
