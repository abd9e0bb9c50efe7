"""Checks of an operation's arguments, before anything is launched.

On the decode path: comparisons of attributes only. No value of a device tensor is read.
"""

from __future__ import annotations

from typing import NoReturn, get_args

import torch

from ep_runtime.config import CombineFormat, EpConfig
from ep_runtime.errors import ConfigError, SequenceError, ShapeError
from ep_runtime.handles import Handle
from ep_runtime.overlap import overlap
from ep_runtime.receive import ReceiveBuffer

ROW_ALIGNMENT = 16  # bytes: rows are read and written as 16-byte vectors
SCALE_BYTES = 4  # scales move as 4-byte words


class Checker:
    """Knows what every operation of one Buffer takes. Raises ShapeError or SequenceError."""

    def __init__(self, config: EpConfig, num_ranks: int, device: torch.device, owner: object):
        self._config = config
        self._device = device
        self._owner = owner
        self._num_ranks = num_ranks
        rows, experts = config.recv_rows(num_ranks), config.local_experts(num_ranks)
        self._local_experts = experts
        batched = config.recv_format == "batched"
        self._rows_shape = (experts, rows, config.hidden) if batched else (rows, config.hidden)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        chain: int,
        num_tokens: torch.Tensor | None,
        expected_tokens: int | None,
        out: ReceiveBuffer | None,
    ) -> int:
        """Returns the row stride of x in bytes."""
        config = self._config
        if type(chain) is not int or not 0 <= chain < config.num_chains:
            self._bad_chain(chain)
        if out is not None:
            self._receive(out)
        stride = self._rows(x)
        rows = x.shape[0]
        self._table("topk_idx", topk_idx, rows)
        if topk_idx.dtype is not torch.int64 and topk_idx.dtype is not torch.int32:
            _wrong("topk_idx.dtype", topk_idx.dtype, "torch.int64 or torch.int32", "convert it")
        if topk_weights is not None:
            self._weights(topk_weights, rows)
        elif config.recv_format == "compact":
            _wrong("topk_weights", None, "a tensor", "'compact' hands them to the experts")
        if scales is not None or config.opaque_scale_words > 0:
            self._scales(scales, rows)
        if num_tokens is not None:
            self._scalar(num_tokens)
        if expected_tokens is not None and (
            type(expected_tokens) is not int or not 0 <= expected_tokens <= config.max_tokens
        ):
            raise ShapeError(
                f"expected_tokens={expected_tokens!r}: it must be an int, 0 .. max_tokens"
                f" ({config.max_tokens}); pass the most tokens any rank sends, or None"
            )
        return stride

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> int:
        """Returns the row stride of y in elements."""
        self._handle(handle, topk_weights)
        _tensor("y", y)
        if y.dtype is not torch.bfloat16:
            _wrong("y.dtype", y.dtype, torch.bfloat16, "convert with y.bfloat16()")
        if y.shape != self._rows_shape:
            _wrong(
                "y.shape",
                list(y.shape),
                list(self._rows_shape),
                f"give a row for each row of Received.x ({self._config.recv_format})",
            )
        stride = self._row_stride("y", y, y.stride(-2) if y.shape[-2] > 1 else y.shape[-1])
        if len(self._rows_shape) == 3 and self._rows_shape[0] > 1:
            between = self._rows_shape[1] * stride
            if y.stride(0) != between:
                _wrong(
                    "y.stride(0)",
                    y.stride(0),
                    f"{between} (R*M rows of {stride} elements)",
                    "call y.contiguous()",
                )
        if out is not None:
            self._out(out, handle.num_rows)
        return stride

    def statistics(
        self, cumulative_recv_count: torch.Tensor | None, wait_ns: torch.Tensor | None
    ) -> None:
        """What an operation adds to."""
        if cumulative_recv_count is not None:
            size = self._local_experts
            self._vector("cumulative_recv_count", cumulative_recv_count, torch.int32, size)
        if wait_ns is not None:
            self._vector("wait_ns", wait_ns, torch.int64, self._num_ranks)

    def _handle(self, handle: Handle, topk_weights: torch.Tensor | None) -> None:
        if not isinstance(handle, Handle):
            _wrong("handle", type(handle).__name__, "Handle", "pass received.handle")
        if handle.owner is not self._owner:
            raise SequenceError(
                f"the handle (chain {handle.chain}, {handle.num_rows} rows) belongs to another"
                " Buffer; combine where the tokens were dispatched, on the rank that received"
                " them"
            )
        if handle.stale:
            raise SequenceError(
                f"the handle (chain {handle.chain}, {handle.num_rows} rows) is stale: a later"
                " dispatch has used its receive tensors, or reset() has dropped it; combine before"
                " that, or give each dispatch its own with out=buffer.new_receive()"
            )
        if topk_weights is not None:
            if not handle.late_weights:
                _wrong("topk_weights", "a tensor", "None", "this dispatch had its weights")
            self._weights(topk_weights, handle.num_rows)
        elif handle.late_weights:
            _wrong("topk_weights", None, "a tensor", "the dispatch of this handle had none")

    def combine_format(self, wanted: CombineFormat | None) -> CombineFormat:
        """The format of one combine. Raises ConfigError where the inbox has no room for it."""
        configured = self._config.combine_format
        if wanted is None or wanted == configured:
            return configured
        if wanted not in get_args(CombineFormat):
            raise ConfigError(
                f"combine_format={wanted!r}: it must be one of {', '.join(get_args(CombineFormat))}"
            )
        if (configured, wanted) != ("bf16", "fp8"):
            raise ConfigError(
                f"combine_format={wanted!r} on a Buffer made for {configured!r}: only one made for"
                " 'bf16' has room for another ('fp8'); build the EpConfig with the format you need"
            )
        return wanted

    def _receive(self, out: ReceiveBuffer) -> None:
        if not isinstance(out, ReceiveBuffer):
            _wrong("out", type(out).__name__, "ReceiveBuffer", "pass buffer.new_receive()")
        if out.received.handle.owner is not self._owner:
            raise ShapeError("out belongs to another Buffer; use this one's new_receive()")

    def _rows(self, x: torch.Tensor) -> int:
        """Rows to dispatch: returns their stride in bytes."""
        _tensor("x", x)
        config = self._config
        opaque = config.dispatch_format == "opaque"
        if not opaque and x.dtype is not torch.bfloat16:
            _wrong("x.dtype", x.dtype, torch.bfloat16, "convert with x.bfloat16()")
        size = x.element_size()
        width = config.opaque_row_bytes // size if opaque else config.hidden
        if x.dim() != 2 or x.shape[1] != width:
            _wrong("x.shape", list(x.shape), f"[T, {width}]", "reshape the rows")
        rows = x.shape[0]
        if rows > config.max_tokens:
            raise ShapeError(
                f"x has {rows} rows, max_tokens={config.max_tokens}; dispatch fewer tokens at once"
                " or build the EpConfig with a larger max_tokens"
            )
        return self._row_stride("x", x, x.stride(0) if rows > 1 else width) * size

    def _scales(self, scales: torch.Tensor | None, rows: int) -> None:
        """Scales of opaque rows: [T, words] of 4 bytes, any strides."""
        words = self._config.opaque_scale_words
        if scales is None:
            _wrong("scales", None, f"[T, {words}]", "give the scales of the opaque rows")
        _tensor("scales", scales)
        if words == 0:
            _wrong("scales", list(scales.shape), "None", "this configuration has no scale words")
        if scales.element_size() != SCALE_BYTES:
            _wrong("scales.dtype", scales.dtype, "a 4-byte dtype", "view it as torch.int32")
        if scales.shape != (rows, words):
            _wrong("scales.shape", list(scales.shape), [rows, words], "one row per row of x")
        if scales.device != self._device:
            _wrong("scales.device", scales.device, self._device, "move it: scales.to(...)")

    def _weights(self, topk_weights: torch.Tensor, rows: int) -> None:
        self._table("topk_weights", topk_weights, rows)
        if topk_weights.dtype is not torch.float32:
            _wrong("topk_weights.dtype", topk_weights.dtype, torch.float32, "use .float()")

    def _vector(self, name: str, vector: torch.Tensor, dtype: torch.dtype, size: int) -> None:
        _tensor(name, vector)
        if vector.dtype is not dtype:
            _wrong(f"{name}.dtype", vector.dtype, dtype, "allocate it so")
        if vector.shape != (size,):
            _wrong(f"{name}.shape", list(vector.shape), [size], "allocate it so")
        if vector.device != self._device:
            _wrong(f"{name}.device", vector.device, self._device, f"move it: {name}.to(...)")
        if not vector.is_contiguous():
            _wrong(f"{name}.stride()", vector.stride(), "contiguous", f"call {name}.contiguous()")

    def _row_stride(self, name: str, rows: torch.Tensor, stride: int) -> int:
        """The row stride, if the rows can be accessed as 16-byte vectors."""
        if rows.device != self._device:
            _wrong(f"{name}.device", rows.device, self._device, f"move it: {name}.to(...)")
        if rows.stride(-1) != 1:
            _wrong(f"{name}.stride(-1)", rows.stride(-1), 1, f"call {name}.contiguous()")
        if stride * rows.element_size() % ROW_ALIGNMENT:
            _wrong(
                f"{name} row stride",
                stride,
                f"a multiple of {ROW_ALIGNMENT // rows.element_size()} elements",
                f"call {name}.contiguous()",
            )
        if rows.data_ptr() % ROW_ALIGNMENT:
            _wrong(
                f"{name}.data_ptr()",
                hex(rows.data_ptr()),
                f"a multiple of {ROW_ALIGNMENT} bytes",
                f"call {name}.clone()",
            )
        return stride

    def _table(self, name: str, table: torch.Tensor, rows: int) -> None:
        """topk_idx or topk_weights: [T, K], contiguous, on the device."""
        _tensor(name, table)
        if table.shape != (rows, self._config.topk):
            _wrong(
                f"{name}.shape",
                list(table.shape),
                [rows, self._config.topk],
                "one row per row of x, one column per entry of topk",
            )
        if table.device != self._device:
            _wrong(f"{name}.device", table.device, self._device, f"move it: {name}.to(...)")
        if not table.is_contiguous():
            _wrong(f"{name}.stride()", table.stride(), "contiguous", f"call {name}.contiguous()")

    def _scalar(self, num_tokens: torch.Tensor) -> None:
        if not isinstance(num_tokens, torch.Tensor):
            _wrong(
                "num_tokens",
                type(num_tokens).__name__,
                "an int32 tensor on the device",
                "pass torch.tensor(n, dtype=torch.int32, device=buffer.device)",
            )
        if num_tokens.dtype is not torch.int32:
            _wrong("num_tokens.dtype", num_tokens.dtype, torch.int32, "convert with .int()")
        if num_tokens.numel() != 1:
            _wrong("num_tokens.shape", list(num_tokens.shape), "one element", "pass a scalar")
        if num_tokens.device != self._device:
            _wrong("num_tokens.device", num_tokens.device, self._device, "move it: .to(...)")

    def _out(self, out: torch.Tensor, rows: int) -> None:
        _tensor("out", out)
        if out.dtype is not torch.bfloat16:
            _wrong("out.dtype", out.dtype, torch.bfloat16, "allocate it as bfloat16")
        if out.shape != (rows, self._config.hidden):
            wanted = [rows, self._config.hidden]
            _wrong("out.shape", list(out.shape), wanted, "one row per dispatched row")
        if not out.is_contiguous():
            _wrong("out.stride()", out.stride(), "contiguous", "pass a contiguous tensor")
        self._row_stride("out", out, self._config.hidden)

    def _bad_chain(self, chain: object) -> NoReturn:
        raise ShapeError(
            f"chain={chain!r}: the chains are 0 .. {self._config.num_chains - 1}; build the"
            " EpConfig with a larger num_chains for more"
        )


def apart(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ShapeError where two tensors share memory: one kernel reads the one and writes the
    other."""
    if overlap(tensor, other):
        _wrong(f"the memory of {name}", f"in that of {other_name}", "apart from it", "give another")


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        _wrong(name, f"of type {type(value).__name__}", "a torch.Tensor", "pass one")
    if value.requires_grad and torch.is_grad_enabled():
        _wrong(
            f"{name}.requires_grad",
            True,
            "False: no gradient goes through low-latency operations",
            f"call under torch.no_grad(), pass {name}.detach(), or use ep_runtime.normal's"
            " dispatch_autograd() and combine_autograd()",
        )


def _wrong(name: str, value: object, wanted: object, remedy: str) -> NoReturn:
    raise ShapeError(f"{name} is {value}, it must be {wanted}; {remedy}")
