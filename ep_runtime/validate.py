"""Checks of an operation's arguments, before anything is launched.

On the decode path: comparisons of attributes only. No value of a device tensor is read.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ep_runtime.config import EpConfig
from ep_runtime.errors import SequenceError, ShapeError
from ep_runtime.handles import Handle

ROW_ALIGNMENT = 16  # bytes: rows are read and written as 16-byte vectors
ROW_MULTIPLE = 8  # BF16 elements in such a vector


class Checker:
    """Knows what every operation of one Buffer takes. Raises ShapeError or SequenceError."""

    def __init__(self, config: EpConfig, num_ranks: int, device: torch.device, owner: object):
        self._config = config
        self._device = device
        self._owner = owner
        rows, experts = config.recv_rows(num_ranks), config.local_experts(num_ranks)
        batched = config.recv_format == "batched"
        self._rows_shape = (experts, rows, config.hidden) if batched else (rows, config.hidden)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        chain: int,
        num_tokens: torch.Tensor | None,
        expected_tokens: int | None,
    ) -> int:
        """Returns the row stride of x in elements."""
        config = self._config
        if not isinstance(chain, int) or not 0 <= chain < config.num_chains:
            self._bad_chain(chain)
        if x.dtype is not torch.bfloat16:
            _wrong("x.dtype", x.dtype, torch.bfloat16, "convert with x.bfloat16()")
        shape = x.shape
        if len(shape) != 2 or shape[1] != config.hidden:
            _wrong("x.shape", list(shape), f"[T, {config.hidden}]", "reshape the rows")
        rows = shape[0]
        if rows > config.max_tokens:
            raise ShapeError(
                f"x has {rows} rows, max_tokens={config.max_tokens}; dispatch fewer tokens at once"
                " or build the EpConfig with a larger max_tokens"
            )
        stride = self._row_stride("x", x, x.stride(0) if rows > 1 else config.hidden)
        self._table("topk_idx", topk_idx, rows)
        if topk_idx.dtype is not torch.int64 and topk_idx.dtype is not torch.int32:
            _wrong("topk_idx.dtype", topk_idx.dtype, "torch.int64 or torch.int32", "convert it")
        self._table("topk_weights", topk_weights, rows)
        if topk_weights.dtype is not torch.float32:
            _wrong("topk_weights.dtype", topk_weights.dtype, torch.float32, "use .float()")
        if num_tokens is not None:
            self._scalar(num_tokens)
        if expected_tokens is not None and not 0 <= expected_tokens <= config.max_tokens:
            raise ShapeError(
                f"expected_tokens={expected_tokens}: it must be 0 .. max_tokens"
                f" ({config.max_tokens}); pass the most tokens any rank sends, or None"
            )
        return stride

    def combine(self, y: torch.Tensor, handle: Handle, out: torch.Tensor | None) -> int:
        """Returns the row stride of y in elements."""
        if not isinstance(handle, Handle):
            _wrong("handle", type(handle).__name__, "Handle", "pass received.handle")
        if handle.owner is not self._owner:
            raise SequenceError(
                f"the handle (chain {handle.chain}, {handle.num_rows} rows) belongs to another"
                " Buffer; combine where the tokens were dispatched, on the rank that received"
                " them"
            )
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

    def _row_stride(self, name: str, rows: torch.Tensor, stride: int) -> int:
        """The row stride, if the rows can be accessed as 16-byte vectors."""
        if rows.device != self._device:
            _wrong(f"{name}.device", rows.device, self._device, f"move it: {name}.to(...)")
        if rows.stride(-1) != 1:
            _wrong(f"{name}.stride(-1)", rows.stride(-1), 1, f"call {name}.contiguous()")
        if stride % ROW_MULTIPLE:
            _wrong(
                f"{name} row stride",
                stride,
                f"a multiple of {ROW_MULTIPLE} elements",
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


def _wrong(name: str, value: object, wanted: object, remedy: str) -> NoReturn:
    raise ShapeError(f"{name} is {value}, it must be {wanted}; {remedy}")
