"""Expert-parallel dispatch and combine whose state lives on the device, made for graph replay.

Names are loaded on first use, so that `import ep_runtime` (and the parts that need no native
module, such as training the language model) works where `ep_runtime._C` was never built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ep_runtime.buffer import Buffer
    from ep_runtime.config import EpConfig
    from ep_runtime.errors import (
        BuildError,
        CaptureError,
        CheckpointError,
        ConfigError,
        CudaError,
        DesyncError,
        EpError,
        GroupFault,
        PeerTimeout,
        RoutingFault,
        SequenceError,
        ShapeError,
    )
    from ep_runtime.handles import Handle, Received, StepStats
    from ep_runtime.pending import Pending
    from ep_runtime.virtual import virtual_ranks
    from ep_runtime.world import World

_HOME = {
    "Buffer": "buffer",
    "EpConfig": "config",
    "Handle": "handles",
    "Pending": "pending",
    "Received": "handles",
    "StepStats": "handles",
    "World": "world",
    "virtual_ranks": "virtual",
    "BuildError": "errors",
    "CaptureError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CudaError": "errors",
    "DesyncError": "errors",
    "EpError": "errors",
    "GroupFault": "errors",
    "PeerTimeout": "errors",
    "RoutingFault": "errors",
    "SequenceError": "errors",
    "ShapeError": "errors",
}

__all__ = [
    "Buffer",
    "BuildError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "CudaError",
    "DesyncError",
    "EpConfig",
    "EpError",
    "GroupFault",
    "Handle",
    "PeerTimeout",
    "Pending",
    "Received",
    "RoutingFault",
    "SequenceError",
    "ShapeError",
    "StepStats",
    "World",
    "__version__",
    "virtual_ranks",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ep_runtime' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"ep_runtime.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
