"""`deep_ep_cpp`, the native module's names that users import, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import Config, EventHandle, topk_idx_t

__all__ = ["Config", "EventHandle", "topk_idx_t"]
