"""`deep_ep.utils`, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import EventHandle, EventOverlap, check_nvlink_connections

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]
