"""Gradients through dispatch and combine, against a dense layer in float64 on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import programs
import pytest
import torch
from expect import random_experts, random_group
from ranks import Group, Place

from ep_runtime import ShapeError
from ep_runtime.normal import (
    NormalBuffer,
    combine_autograd,
    dispatch_autograd,
    virtual_normal_ranks,
)
from ep_runtime.normal.reference import RankTokens

OpenGroup = Callable[..., Group]
HIDDEN = 256
MOST = 24

Gradients = dict[str, torch.Tensor]


def bring(
    buffer: NormalBuffer,
    tokens: RankTokens,
    gains: torch.Tensor,
    bias: torch.Tensor,
    seeds: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """What layer() works on, to the device: such a copy waits in the driver, see finish(), so no
    rank launches anything that waits for others before all ranks have done it."""
    given = (tokens.x, tokens.topk_weights, bias, tokens.topk_idx, gains, *seeds)
    programs.keep(buffer, "inputs", [one.to(buffer.device, copy=True) for one in given])
    programs.poison_pool(buffer)
    programs.finish(buffer)


def layer(buffer: NormalBuffer, weights_too: bool, worst: int) -> Gradients:
    """Expert e multiplies a row by gains[e]; forward, then backward of <y, seed>."""
    x, weights, added, idx, gains, seed, weights_seed = programs.kept(buffer, "inputs")
    for one in (x, weights, added):
        one.requires_grad_()
    received = dispatch_autograd(
        buffer,
        x,
        idx,
        weights,
        num_experts=gains.shape[0],
        num_worst_tokens=worst,
    )
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    local = gains.shape[0] // buffer.num_ranks
    mine = gains[buffer.rank * local : (buffer.rank + 1) * local]
    real = (received.topk_idx >= 0).any(1, keepdim=True)
    rows = torch.where(real, received.x, 0).float()
    factor = (received.topk_weights.unsqueeze(2) * mine[received.topk_idx.clamp(min=0)]).sum(1)
    y = (rows * factor).bfloat16()
    sent = received.topk_weights if weights_too else None
    out, out_weights = combine_autograd(
        buffer, y, received.handle, topk_weights=sent, bias=(added, added)
    )
    loss = (out.float() * seed).sum()
    if out_weights is not None:
        loss = loss + (out_weights * weights_seed).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weights.grad is not None
    assert added.grad is not None
    programs.finish(buffer)
    return {
        "out": out.detach().cpu(),
        "x": x.grad.cpu(),
        "weights": weights.grad.cpu(),
        "bias": added.grad.cpu(),
    }


def dense(
    tokens: RankTokens,
    gains: torch.Tensor,
    bias: torch.Tensor,
    weights_too: bool,
    seeds: tuple[torch.Tensor, torch.Tensor],
) -> Gradients:
    """The same without communication, in float64."""
    x = tokens.x.double().requires_grad_()
    weights = tokens.topk_weights.double().requires_grad_()
    added = bias.double().requires_grad_()
    idx = tokens.topk_idx.long()
    used = torch.where(idx >= 0, weights, 0.0)
    out = x * (used.unsqueeze(2) * gains.double()[idx.clamp(min=0)]).sum(1) + 2 * added
    loss = (out * seeds[0].double()).sum()
    if weights_too:
        loss = loss + (used * seeds[1].double()).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weights.grad is not None
    assert added.grad is not None
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, "bias": added.grad}


def close(what: str, got: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Rows went through BF16 a few times: an error of some units of the largest term."""
    assert got.shape == right.shape, what
    error = (got.double() - right).abs()
    assert not error.isnan().any(), what
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= 2.0**-6 * scale, f"{what}: {worst} of {scale}"


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_gradients_are_those_of_a_dense_layer(
    open_group: OpenGroup, place: Place, rng: torch.Generator, exact: bool, weights_too: bool
) -> None:
    ranks = place.num_ranks
    group = open_group(max_tokens=MOST, max_hidden=HIDDEN, max_experts=64)
    worst = 0 if exact else ranks * MOST
    for _ in range(2):
        experts = random_experts(rng, ranks, 4)
        inputs = [
            RankTokens(torch.randn(one.x.shape, generator=rng).bfloat16(), *rest)
            for one in random_group(rng, ranks, HIDDEN, 4, experts, MOST)
            for rest in [(one.topk_idx, one.topk_weights)]
        ]
        gains = torch.randn((experts, HIDDEN), generator=rng)
        biases = [torch.randn(one.x.shape, generator=rng).bfloat16() for one in inputs]
        seeds = [
            (
                torch.randn(one.x.shape, generator=rng).bfloat16().float(),
                torch.randn(one.topk_weights.shape, generator=rng),
            )
            for one in inputs
        ]
        group.run(
            bring,
            [
                (one, gains, bias, seed)
                for one, bias, seed in zip(inputs, biases, seeds, strict=True)
            ],
        )
        got = group.run(layer, [(weights_too, worst)] * ranks)
        for rank, mine in enumerate(got):
            right = dense(inputs[rank], gains, biases[rank], weights_too, seeds[rank])
            for name, value in right.items():
                size = float(value.abs().max()) if value.numel() else 1.0
                # Sums over channels: of as many rounded products.
                scale = max(size, 4.0) * (4 if name == "weights" else 1)
                close(f"rank {rank}: {name}", mine[name], value, scale)


def test_weights_of_entries_that_go_nowhere_have_no_gradient() -> None:
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(2, HIDDEN).bfloat16().requires_grad_()
    weights = torch.rand(2, 2).requires_grad_()
    idx = torch.tensor([[0, -1], [-1, -1]])
    received = dispatch_autograd(buffer, x, idx, weights, num_experts=1)
    out, back = combine_autograd(
        buffer, received.x, received.handle, topk_weights=received.topk_weights
    )
    assert back is not None
    (out.float().sum() + 3 * back.sum()).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weights.grad, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))  # type: ignore[arg-type]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[1.0], [0.0]]).expand(2, HIDDEN).bfloat16())


def unaligned(rows: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, two bytes behind where a row may begin."""
    held = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1:].view(rows.shape).copy_(rows)
    assert held.is_contiguous()
    assert held.data_ptr() % 16
    return held


def test_gradients_may_begin_anywhere() -> None:
    """Refused on one rank, they would leave the others waiting."""
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(3, HIDDEN).bfloat16().requires_grad_()
    idx, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    grad = torch.randn(3, HIDDEN).bfloat16()

    received = dispatch_autograd(buffer, x, idx, weights, num_experts=1)
    received.x.backward(unaligned(grad))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, grad)

    y = torch.randn(3, HIDDEN).bfloat16().requires_grad_()
    out, _ = combine_autograd(buffer, y, received.handle)
    out.backward(unaligned(grad))  # type: ignore[no-untyped-call]
    assert y.grad is not None
    assert torch.equal(y.grad, grad)


def dispatched(buffer: NormalBuffer, x: torch.Tensor) -> torch.Tensor:
    idx, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    return dispatch_autograd(buffer, x, idx, weights, num_experts=1).x


def combined(buffer: NormalBuffer, x: torch.Tensor) -> torch.Tensor:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    handle = buffer.dispatch(x.detach(), idx, num_experts=1).handle
    return combine_autograd(buffer, x, handle)[0]


@pytest.mark.parametrize("through", [dispatched, combined])
def test_gradients_of_gradients_are_refused(
    through: Callable[[NormalBuffer, torch.Tensor], torch.Tensor],
) -> None:
    """Their part of the second derivative would be missing, with nothing to tell."""
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(2, HIDDEN).bfloat16().requires_grad_()
    loss = through(buffer, x).float().square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("missing", [{"topk_idx": None}, {"topk_weights": None}])
def test_a_dispatch_with_gradients_needs_choices_and_weights(missing: dict[str, None]) -> None:
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    idx, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    x = torch.zeros(2, HIDDEN).bfloat16()
    given: dict[str, Any] = {"topk_idx": idx, "topk_weights": weights} | missing
    (name,) = missing
    with pytest.raises(ShapeError, match=f"{name} of dispatch_autograd is NoneType.*pass it"):
        dispatch_autograd(buffer, x, num_experts=1, layout=buffer.layout(idx, 1), **given)
    assert buffer.stats.dispatches == 0


def test_an_overwritten_out_is_seen_by_a_backward_pass_that_saved_it() -> None:
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(2, HIDDEN).bfloat16()
    received = buffer.dispatch(x, torch.zeros(2, 1, dtype=torch.int64), num_experts=1)
    gain = torch.ones(HIDDEN, dtype=torch.bfloat16).requires_grad_()
    out, _ = buffer.combine(received.x, received.handle)
    loss = (gain * out).float().sum()
    buffer.combine(-received.x, received.handle, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_an_out_of_inference_mode_is_written_like_any_other() -> None:
    """It has no version to count up."""
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(2, HIDDEN).bfloat16()
    received = buffer.dispatch(x, torch.zeros(2, 1, dtype=torch.int64), num_experts=1)
    with torch.inference_mode():
        out = torch.empty_like(x)
    buffer.combine(received.x, received.handle, out=out)
    assert torch.equal(out, x)


def test_an_out_that_requires_grad_is_refused_where_gradients_are_recorded() -> None:
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.randn(2, HIDDEN).bfloat16()
    received = buffer.dispatch(x, torch.zeros(2, 1, dtype=torch.int64), num_experts=1)
    out = torch.zeros(2, HIDDEN).bfloat16().requires_grad_()
    with pytest.raises(ShapeError, match=r"out.requires_grad.*combine_autograd"):
        buffer.combine(received.x, received.handle, out=out)
    assert buffer.stats.combines == 0
    with torch.no_grad():
        buffer.combine(received.x, received.handle, out=out)
    assert torch.equal(out, x)


def test_fp8_rows_are_refused() -> None:
    buffer = virtual_normal_ranks(1, backend="host", max_tokens=4, max_hidden=HIDDEN)[0]
    x = torch.zeros(2, HIDDEN).to(torch.float8_e4m3fn)
    with pytest.raises(ShapeError, match="bfloat16"):
        dispatch_autograd(
            buffer, x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), num_experts=1
        )
