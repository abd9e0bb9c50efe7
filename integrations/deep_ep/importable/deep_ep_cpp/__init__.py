"""`deep_ep_cpp`, the native module's names that users import, served by ep_runtime."""

from ep_runtime.integrations.deep_ep import Buffer, Config, EventHandle, topk_idx_t

get_low_latency_rdma_size_hint = Buffer.get_low_latency_rdma_size_hint
is_sm90_compiled = Buffer.is_sm90_compiled

__all__ = [
    "Config",
    "EventHandle",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "topk_idx_t",
]
