"""The native module's description of memory, in Python's words. Nothing is computed twice."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ep_runtime.config import EpConfig
from ep_runtime.memory import MemorySizes
from ep_runtime.native import _C

WIRE = {"bf16": _C.WIRE_BF16, "fp8": _C.WIRE_FP8, "opaque": _C.WIRE_OPAQUE}
FORMAT = {
    "batched": _C.RECV_BATCHED,
    "contiguous": _C.RECV_CONTIGUOUS,
    "compact": _C.RECV_COMPACT,
}
SCALE_GROUP = 128  # channels that share one FP8 scale


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes and offsets that the Python side needs. `stats_*` lie in a rank's local memory."""

    sizes: MemorySizes
    routing_bytes: int  # what a handle keeps of its dispatch
    message_bytes: int
    combine_bytes: int
    stats_offset: int
    stats_stride: int
    stats_bytes: int


@functools.lru_cache(maxsize=64)  # asked for by every new_receive
def shape_of(config: EpConfig, num_ranks: int) -> _C.Shape:
    """The native description of the group."""
    return _C.Shape(
        num_ranks=num_ranks,
        num_experts=config.num_experts,
        topk=config.topk,
        hidden=config.hidden,
        max_tokens=config.max_tokens,
        num_chains=config.num_chains,
        wire=WIRE[config.dispatch_format],
        opaque_row_bytes=config.opaque_row_bytes,
        opaque_scales=config.opaque_scale_words,
        combine_wire=WIRE[config.combine_format],
    )


@functools.lru_cache(maxsize=64, typed=True)
def layout_of(config: EpConfig, num_ranks: int) -> Layout:
    """Sizes of the group's memory. Raises ConfigError if the group cannot have this config."""
    config.validate_for(num_ranks)
    native = _C.layout(shape_of(config, num_ranks))
    return Layout(
        sizes=MemorySizes(native["heap_bytes"], native["local_bytes"], _C.fault_bytes()),
        routing_bytes=native["routing_bytes"],
        message_bytes=native["message_bytes"],
        combine_bytes=native["combine_bytes"],
        stats_offset=native["stats_offset"],
        stats_stride=native["stats_stride"],
        stats_bytes=native["stats_bytes"],
    )
