"""The handle of a low-latency dispatch, and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ep_runtime.buffer import Buffer as EpBuffer
from ep_runtime.errors import SequenceError, ShapeError
from ep_runtime.handles import Handle, Received


class LowLatencyHandle(tuple[Any, ...]):
    """DeepEP's handle: (src_info, layout_range, M, H, E), to be passed to combine as it is.

    src_info      int32 [L, R*M]: token at its source of each received row
    layout_range  int64 [L, R]: (first row << 32) | rows, of each local expert and source
    M, H, E       max tokens per rank, hidden, number of experts
    """

    routing: Handle | None  # known once the receive was launched
    engine: Engine

    @staticmethod
    def make(received: Received, engine: Engine) -> LowLatencyHandle:
        config = engine.buffer.config
        handle = LowLatencyHandle(
            (
                received.source_token,
                received.layout_range,
                config.max_tokens,
                config.hidden,
                config.num_experts,
            )
        )
        handle.routing = None
        handle.engine = engine
        return handle


@dataclass(slots=True)
class Engine:
    """The native buffer for one combination of sizes, and the rows of zero-copy combines."""

    buffer: EpBuffer
    combine_rows: torch.Tensor | None = None


def engine_of(handle: LowLatencyHandle) -> Engine:
    """The buffer of the dispatch, received or not. Raises ShapeError."""
    if not isinstance(handle, LowLatencyHandle):
        raise ShapeError(
            f"handle is a {type(handle).__name__}: pass the handle that low_latency_dispatch"
            " returned, itself"
        )
    return handle.engine


def routing_of(handle: LowLatencyHandle) -> Handle:
    """What a combine of `handle` takes. Raises SequenceError."""
    if handle.routing is None:
        raise SequenceError(
            "combine of a handle whose dispatch was not received: call its hook first"
        )
    return handle.routing


def zero_copy_rows(engine: Engine, x: torch.Tensor) -> torch.Tensor:
    """The rows that the caller wrote in place; `x` only has their shape."""
    rows = engine.combine_rows
    if rows is None:
        raise SequenceError(
            "zero_copy=True before get_next_low_latency_combine_buffer(handle): get the buffer,"
            " write the experts' results into it, then combine"
        )
    if x.shape != rows.shape or x.dtype is not rows.dtype:
        raise ShapeError(
            f"x is {list(x.shape)} {x.dtype}: it must be {list(rows.shape)} {rows.dtype}, as the"
            " rows in the combine buffer"
        )
    return rows
