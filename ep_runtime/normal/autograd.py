"""Dispatch and combine with gradients: each is the other's backward.

Backward passes communicate. Every rank has to run its own, in the same order, also where it sent
or received nothing: let the loss of every rank depend on what came out of the last combine.
Gradients travel as BF16 rows and are summed in FP32, like the rows of the forward pass. They have
no gradients themselves: a double backward pass raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ep_runtime.errors import ShapeError
from ep_runtime.normal.buffer import NormalBuffer
from ep_runtime.normal.handles import NormalHandle, NormalReceived
from ep_runtime.normal.validate import ROW_MULTIPLE, wrong


def dispatch_autograd(
    buffer: NormalBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    **options: Any,
) -> NormalReceived:
    """buffer.dispatch(), whose x and topk_weights carry gradients back to those that were given.

    x             [T, H] bf16; FP8 rows have no gradient: quantise behind the dispatch
    topk_idx      [T, K] int64 or int32
    topk_weights  [T, K] float32
    options       further arguments of dispatch()
    The backward pass is a combine: grad x[t] is the sum of the gradients of all copies of x[t].
    Raises as dispatch() does, in the backward pass as combine() does.
    """
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.bfloat16:
        kind = type(x).__name__ if not isinstance(x, torch.Tensor) else x.dtype
        raise ShapeError(
            f"x of dispatch_autograd is {kind}, it must be a bfloat16 tensor: gradients are rows"
            " of the same kind; quantise behind the dispatch"
        )
    # What has no top-k has nothing to bring weights home by, and would be found out too late.
    for name, given in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        if not isinstance(given, torch.Tensor):
            remedy = "pass it, or send rows alone with NormalBuffer.dispatch()"
            wrong(f"{name} of dispatch_autograd", type(given).__name__, "a tensor", remedy)
    kept: list[NormalReceived] = []
    rows, weights = _Dispatch.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, buffer, topk_idx, options, kept
    )
    return replace(kept[0], x=rows, topk_weights=weights)


def combine_autograd(
    buffer: NormalBuffer,
    x: torch.Tensor,
    handle: NormalHandle,
    *,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """buffer.combine(), with gradients of x, topk_weights and the biases.

    Arguments and results as of combine(), but it takes no out: the result is a new tensor. The
    backward pass is a cached dispatch. Raises as combine() does, in the backward pass as
    dispatch_cached() does.
    """
    biases = [] if bias is None else list(bias) if isinstance(bias, Sequence) else [bias]
    y, weights = _Combine.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, buffer, handle, num_sms, *biases
    )
    return y, weights


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        buffer: NormalBuffer,
        topk_idx: torch.Tensor,
        options: dict[str, Any],
        kept: list[NormalReceived],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        received = buffer.dispatch(x, topk_idx, topk_weights, **options)
        assert received.topk_idx is not None
        assert received.topk_weights is not None
        ctx.buffer, ctx.handle = buffer, received.handle
        ctx.num_sms = options.get("num_sms")
        # A copy: the tensor itself would keep all received rows until the backward pass.
        ctx.save_for_backward(received.topk_idx >= 0)
        kept.append(received)
        return received.x, received.topk_weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (real,) = ctx.saved_tensors
        # Where topk_idx is -1 the received weight was the constant 0, whatever was sent.
        masked = torch.where(real, grad_weights.float(), 0.0).contiguous()
        x, weights = ctx.buffer.combine(
            _gradient_rows(grad_x), ctx.handle, topk_weights=masked, num_sms=ctx.num_sms
        )
        return x, weights, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        buffer: NormalBuffer,
        handle: NormalHandle,
        num_sms: int | None,
        *bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.buffer, ctx.handle, ctx.num_sms = buffer, handle, num_sms
        ctx.num_biases, ctx.weighted = len(bias), topk_weights is not None
        return buffer.combine(
            x, handle, topk_weights=topk_weights, bias=bias or None, num_sms=num_sms
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: torch.Tensor, grad_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        handle: NormalHandle = ctx.handle
        weights = None
        if ctx.weighted and grad_weights is not None:
            weights = grad_weights.float().contiguous()
        received = ctx.buffer.dispatch_cached(
            _gradient_rows(grad_y), handle, topk_weights=weights, num_sms=ctx.num_sms
        )
        x, back = received.x, received.topk_weights
        if not handle.exact:
            # Nobody sent the rows after the last one: what lies there is no gradient.
            real = _real_rows(ctx.buffer, handle)
            x = torch.where(real, x, 0)
            back = None if back is None else torch.where(real, back, 0)
        return (x, back, None, None, None, *[grad_y] * ctx.num_biases)


def _gradient_rows(grad: torch.Tensor) -> torch.Tensor:
    """A gradient as rows that can be sent. A view that begins anywhere is copied: refused on this
    rank, it would leave the others waiting."""
    rows = grad.bfloat16().contiguous()
    return rows.clone() if rows.data_ptr() % ROW_MULTIPLE else rows


def _real_rows(buffer: NormalBuffer, handle: NormalHandle) -> torch.Tensor:
    """bool [N, 1]: rows that somebody sent."""
    number = torch.arange(handle.num_rows, device=buffer.device)
    return (number < handle.rank_prefix[-1, buffer.rank]).unsqueeze(1)
