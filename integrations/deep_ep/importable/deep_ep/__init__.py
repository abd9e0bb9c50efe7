"""`deep_ep`, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import (
    Buffer,
    Config,
    EventHandle,
    EventOverlap,
    __version__,
    topk_idx_t,
)

# Programs use deep_ep.utils without importing it. This package is called deep_ep only where it is
# found as that, so that it cannot name itself.
from . import buffer, utils  # noqa: TID252

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "buffer",
    "topk_idx_t",
    "utils",
]
