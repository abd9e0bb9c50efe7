"""`deep_ep.buffer`, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import (
    Buffer,
    Config,
    EventHandle,
    EventOverlap,
    check_nvlink_connections,
)

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "check_nvlink_connections"]
