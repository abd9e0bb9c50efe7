"""`deep_ep`, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import (
    Buffer,
    Config,
    EventHandle,
    EventOverlap,
    __version__,
    topk_idx_t,
)

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
