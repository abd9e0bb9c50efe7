"""Checks of a normal operation's arguments, before anything is launched.

Comparisons of attributes only: no value of a device tensor is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from ep_runtime.errors import ShapeError
from ep_runtime.normal.handles import Layout, NormalHandle
from ep_runtime.overlap import memory_of, overlap

MAX_ROW_BYTES = 32768
MAX_TOKENS = 1 << 20
ROW_MULTIPLE = 16  # bytes: rows travel as 16-byte vectors
SCALE_DTYPES = (torch.float32, torch.int32)
IDX_DTYPES = (torch.int64, torch.int32)

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Rows to send, with the strides that the native call takes (bytes, and elements of scales)."""

    x: torch.Tensor
    stride_bytes: int
    row_bytes: int
    scales: torch.Tensor | None
    num_scales: int
    scale_stride_token: int
    scale_stride_group: int

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]


def wrong(what: str, value: object, wanted: object, remedy: str) -> NoReturn:
    raise ShapeError(f"{what} is {value}, it must be {wanted}; {remedy}")


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        wrong(name, type(value).__name__, "a tensor", "convert it, or leave out what may be None")


def _int(name: str, value: object) -> None:
    """The type alone is told: to print the value of a tensor waits for the device."""
    if type(value) is not int:
        wrong(name, type(value).__name__, "an int", "convert it with int()")


@dataclass(frozen=True, slots=True)
class Checker:
    """What the operations of one NormalBuffer take. Raises ShapeError."""

    num_ranks: int
    max_experts: int
    max_topk: int
    device: torch.device
    owner: object

    def rows(self, x: Rows) -> Outgoing:
        """x of a dispatch: BF16, or one byte per channel with scales or without."""
        if isinstance(x, tuple) and len(x) != 2:
            wrong("x", f"a tuple of {len(x)}", "a tensor or (x, scales)", "pass both, or x alone")
        rows, scales = x if isinstance(x, tuple) else (x, None)
        require_tensor("x", rows)
        size = rows.element_size()
        if rows.dtype is not torch.bfloat16 and size != 1:
            wrong("x.dtype", rows.dtype, "bfloat16 or one byte wide", "convert or quantise x")
        row_bytes, stride = self._row_bytes("x", rows)
        if rows.shape[0] > MAX_TOKENS:
            wrong("x.shape[0]", rows.shape[0], f"at most {MAX_TOKENS}", "dispatch fewer tokens")
        if scales is None:
            return Outgoing(rows, stride, row_bytes, None, 0, 0, 0)
        require_tensor("scales", scales)
        self._on_device("scales", scales)
        if scales.dtype not in SCALE_DTYPES:
            wrong("scales.dtype", scales.dtype, "float32 or int32", "convert or pack them")
        if scales.dim() not in (1, 2) or scales.shape[0] != rows.shape[0]:
            wanted = f"[{rows.shape[0]}, groups] or [{rows.shape[0]}]"
            wrong("scales.shape", list(scales.shape), wanted, "one row per row of x")
        flat = scales.dim() == 1
        groups = 1 if flat else scales.shape[1]
        if not 1 <= 4 * groups <= row_bytes:
            wrong(
                "scales.shape[1]", groups, f"1 to {row_bytes // 4}", "use longer groups of channels"
            )
        strides = (scales.stride(0), 0 if flat else scales.stride(1))
        return Outgoing(rows, stride, row_bytes, scales, groups, *strides)

    def combined_rows(self, x: torch.Tensor, handle: NormalHandle) -> tuple[int, int]:
        """x of a combine; returns (stride in bytes, channels)."""
        require_tensor("x", x)
        if x.dtype is not torch.bfloat16:
            wrong("x.dtype", x.dtype, torch.bfloat16, "convert with x.bfloat16()")
        _, stride = self._row_bytes("x", x)
        if x.shape[0] != handle.num_rows:
            wrong("x.shape[0]", x.shape[0], handle.num_rows, "one row per received row")
        return stride, x.shape[1]

    def experts(self, num_experts: int) -> int:
        """Local experts, if the group can have that many experts."""
        _int("num_experts", num_experts)
        if num_experts < self.num_ranks:
            wanted = f"at least {self.num_ranks}, one per rank"
            wrong("num_experts", num_experts, wanted, "pad it with experts that nobody chooses")
        if num_experts > self.max_experts:
            wanted = f"at most max_experts={self.max_experts}"
            remedy = "build the NormalBuffer with a larger max_experts"
            wrong("num_experts", num_experts, wanted, remedy)
        if num_experts % self.num_ranks:
            wrong("num_experts", num_experts, f"a multiple of {self.num_ranks} ranks", "pad it")
        return num_experts // self.num_ranks

    def routes(self, topk_idx: torch.Tensor, rows: int | None = None) -> int:
        """topk_idx [T, K]; returns K."""
        require_tensor("topk_idx", topk_idx)
        if topk_idx.dtype not in IDX_DTYPES:
            wrong("topk_idx.dtype", topk_idx.dtype, "int64 or int32", "convert it")
        self._table("topk_idx", topk_idx, rows, "one row per row of x")
        if topk_idx.shape[0] > MAX_TOKENS:
            wanted = f"at most {MAX_TOKENS}"
            wrong("topk_idx.shape[0]", topk_idx.shape[0], wanted, "count fewer tokens at once")
        return topk_idx.shape[1]

    def weights(
        self,
        topk_weights: torch.Tensor,
        rows: int,
        topk: int | None = None,
        remedy: str = "one row per row of x",
    ) -> None:
        """remedy: for another number of rows."""
        require_tensor("topk_weights", topk_weights)
        if topk_weights.dtype is not torch.float32:
            wrong("topk_weights.dtype", topk_weights.dtype, torch.float32, "convert with .float()")
        self._table("topk_weights", topk_weights, rows, remedy)
        if topk is not None and topk_weights.shape[1] != topk:
            wrong("topk_weights.shape[1]", topk_weights.shape[1], topk, "one weight per entry")

    def layout(self, layout: Layout, rows: int, num_experts: int | None) -> int:
        """A caller's own layout: shapes and types that the native call relies on; returns the
        number of experts, the layout's unless it is given."""
        remedy = "pass what layout() returned for these tokens and experts"
        if not isinstance(layout, Layout):
            wrong("layout", type(layout).__name__, "a Layout", remedy)
        if num_experts is None:
            require_tensor("layout.tokens_per_expert", layout.tokens_per_expert)
            num_experts = layout.tokens_per_expert.numel()
        self.experts(num_experts)
        for name, shape, dtype in (
            ("tokens_per_rank", (self.num_ranks,), torch.int32),
            ("tokens_per_expert", (num_experts,), torch.int32),
            ("is_token_in_rank", (rows, self.num_ranks), torch.bool),
        ):
            tensor: torch.Tensor = getattr(layout, name)
            require_tensor(f"layout.{name}", tensor)
            if tensor.shape != shape or tensor.dtype is not dtype:
                value = f"{list(tensor.shape)} {tensor.dtype}"
                wrong(f"layout.{name}", value, f"{list(shape)} {dtype}", remedy)
            self._on_device(f"layout.{name}", tensor)
            if not tensor.is_contiguous():
                wrong(f"layout.{name}.stride()", tensor.stride(), "contiguous", remedy)
        return num_experts

    def handle(self, handle: NormalHandle, rows: int | None = None) -> None:
        if not isinstance(handle, NormalHandle):
            wrong("handle", type(handle).__name__, "a NormalHandle", "pass received.handle")
        if handle.owner is not self.owner:
            raise ShapeError(
                "handle was made by another NormalBuffer; pass it to the one whose dispatch"
                " returned it"
            )
        if rows is not None and rows != handle.num_tokens:
            wrong("x.shape[0]", rows, handle.num_tokens, "dispatch the rows of the handle's tokens")

    def bias(
        self, bias: torch.Tensor | Sequence[torch.Tensor] | None, shape: tuple[int, int]
    ) -> list[torch.Tensor]:
        """No, one or two BF16 [T, H]."""
        if bias is None:
            return []
        found = list(bias) if isinstance(bias, Sequence) else [bias]
        if len(found) > 2:
            wrong("bias", f"{len(found)} tensors", "at most 2", "add them up first")
        for index, one in enumerate(found):
            self._result(f"bias[{index}]", one, shape)
        return found

    def out(
        self,
        out: torch.Tensor,
        shape: tuple[int, int],
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor] = (),
    ) -> None:
        """Where a combine of x and topk_weights writes. Ranks at work read those while it does."""
        self._result("out", out, shape)
        if out.requires_grad and torch.is_grad_enabled():
            remedy = "use combine_autograd(), or combine under torch.no_grad()"
            wrong("out.requires_grad", True, "False where gradients are recorded", remedy)
        # A bias in the very place of out is read before it is written; one beside it is not.
        apart = [b for b in biases if b.data_ptr() != out.data_ptr()]
        for name, other in (
            ("x", x),
            ("topk_weights", topk_weights),
            *(("bias", b) for b in apart),
        ):
            if other is None or not overlap(out, other):
                continue
            (begin, end), (first, last) = memory_of(out), memory_of(other)
            place = f"at {begin:#x}, {end - begin} bytes"
            wanted = f"apart from {name} at {first:#x}, {last - first} bytes"
            wrong("out", place, wanted, "give it memory of its own, or leave it out")

    def alignment(self, alignment: int) -> None:
        _int("expert_alignment", alignment)
        if not 1 <= alignment <= 65536:
            wrong("expert_alignment", alignment, "an integer from 1 to 65536", "use 1 for none")

    def most_tokens(self, num_tokens: int, max_tokens: int) -> None:
        """Where there are nodes: what a rank keeps for the others of its rail is sized by it."""
        if num_tokens > max_tokens:
            remedy = "dispatch fewer tokens, or call reserve(max_tokens=...) on every rank"
            wrong("x.shape[0]", num_tokens, f"at most max_tokens={max_tokens}", remedy)

    def worst_tokens(self, num_worst_tokens: int) -> None:
        most = MAX_TOKENS * self.num_ranks
        _int("num_worst_tokens", num_worst_tokens)
        if not 0 <= num_worst_tokens <= most:
            wrong("num_worst_tokens", num_worst_tokens, f"0 to {most}", "give 0 for exact sizes")

    def _result(self, name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> None:
        require_tensor(name, tensor)
        if tensor.dtype is not torch.bfloat16:
            wrong(f"{name}.dtype", tensor.dtype, torch.bfloat16, "use bfloat16")
        if tensor.shape != shape:
            wrong(f"{name}.shape", list(tensor.shape), list(shape), "one row per token")
        self._on_device(name, tensor)
        if not tensor.is_contiguous():
            wrong(f"{name}.stride()", tensor.stride(), "contiguous", f"call {name}.contiguous()")
        self._aligned(name, tensor)

    def _row_bytes(self, name: str, rows: torch.Tensor) -> tuple[int, int]:
        """(bytes of a row, bytes from one to the next) of rows that 16-byte vectors can move."""
        if rows.dim() != 2 or not rows.shape[1]:
            wrong(f"{name}.shape", list(rows.shape), "[T, H]", "reshape the rows")
        self._on_device(name, rows)
        size = rows.element_size()
        row_bytes = rows.shape[1] * size
        if row_bytes % ROW_MULTIPLE or row_bytes > MAX_ROW_BYTES:
            wrong(
                f"{name} row",
                f"{row_bytes} bytes",
                f"a multiple of {ROW_MULTIPLE} bytes, at most {MAX_ROW_BYTES}",
                "pad the channels, or send them in parts",
            )
        stride = row_bytes if rows.shape[0] < 2 else rows.stride(0) * size
        if rows.stride(1) != 1 and rows.numel():
            wrong(f"{name}.stride(1)", rows.stride(1), 1, f"call {name}.contiguous()")
        if stride % ROW_MULTIPLE or stride < 0:
            wrong(
                f"{name} row stride",
                f"{stride} bytes",
                f"a multiple of {ROW_MULTIPLE}",
                f"call {name}.contiguous()",
            )
        self._aligned(name, rows)
        return row_bytes, stride

    def _table(self, name: str, table: torch.Tensor, rows: int | None, remedy: str) -> None:
        """[T, K], contiguous, on the device."""
        if table.dim() != 2 or rows not in (None, table.shape[0]):
            wanted = f"[{'T' if rows is None else rows}, K]"
            wrong(f"{name}.shape", list(table.shape), wanted, remedy)
        if not 1 <= table.shape[1] <= self.max_topk:
            wanted = f"from 1 to max_topk={self.max_topk}"
            remedy = "send as many, or build the NormalBuffer with a larger max_topk (at most 32)"
            wrong(f"{name}.shape[1]", table.shape[1], wanted, remedy)
        self._on_device(name, table)
        if not table.is_contiguous():
            wrong(f"{name}.stride()", table.stride(), "contiguous", f"call {name}.contiguous()")

    def _on_device(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.device:
            wrong(f"{name}.device", tensor.device, self.device, f"move it: {name}.to(...)")

    def _aligned(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.data_ptr() % ROW_MULTIPLE:
            wrong(
                f"{name}.data_ptr()",
                hex(tensor.data_ptr()),
                f"a multiple of {ROW_MULTIPLE} bytes",
                f"call {name}.clone()",
            )
