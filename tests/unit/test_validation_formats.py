"""Arguments that choose a format, receive tensors, late weights or tallies: what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from good_calls import CONFIG, ROWS, bf16, dispatch

from ep_runtime import Buffer, ConfigError, EpConfig, SequenceError, ShapeError, virtual_ranks
from ep_runtime.handles import Uses
from ep_runtime.receive import allocate_receive


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    made = virtual_ranks(CONFIG, 2, "host")
    yield made
    for buffer in made:
        buffer.close()


def test_late_weights_are_refused_where_ranks_share_a_device(buffers: list[Buffer]) -> None:
    with pytest.raises(SequenceError, match="without topk_weights on virtual rank 0.*processes"):
        dispatch(buffers[0], topk_weights=None)
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    assert not received[0].handle.late_weights


@pytest.fixture
def alone() -> Iterator[Buffer]:
    """A rank that shares its device with no other."""
    (buffer,) = virtual_ranks(replace(CONFIG, dispatch_format="bf16"), 1, "host")
    with buffer:
        yield buffer


def test_receive_tensors_of_another_buffer_are_refused(buffers: list[Buffer]) -> None:
    with pytest.raises(ShapeError, match="out belongs to another Buffer"):
        dispatch(buffers[0], out=buffers[1].new_receive())
    received = buffers[0].new_receive().received
    with pytest.raises(ShapeError, match=r"out is Received.*new_receive\(\)"):
        dispatch(buffers[0], out=received)


def test_formats_without_room_are_refused(buffers: list[Buffer], alone: Buffer) -> None:
    alone.new_receive(dispatch_format="fp8")
    with pytest.raises(ConfigError, match="'bf16' on a Buffer made for 'fp8'"):
        buffers[0].new_receive(dispatch_format="bf16")
    with pytest.raises(ConfigError, match="'opaque' on a Buffer made for 'bf16'"):
        alone.new_receive(dispatch_format="opaque")


def test_scales_are_refused_where_rows_have_none(buffers: list[Buffer]) -> None:
    with pytest.raises(ShapeError, match=r"scales is \[5, 2\].*None.*no scale words"):
        dispatch(buffers[0], scales=torch.zeros(ROWS, 2))


OPAQUE = EpConfig(
    num_experts=8,
    topk=4,
    hidden=256,
    max_tokens=16,
    dispatch_format="opaque",
    opaque_row_bytes=48,
    opaque_scale_words=3,
)
BAD_OPAQUE: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(ROWS, 32, dtype=torch.uint8)}, r"x\.shape is \[5, 32\].*\[T, 48\]"),
    ({"x": torch.zeros(ROWS, 48)}, r"x\.shape is \[5, 48\].*\[T, 12\]"),
    ({"scales": None}, r"scales is None.*\[T, 3\]"),
    ({"scales": torch.zeros(ROWS, 2)}, r"scales\.shape is \[5, 2\].*\[5, 3\]"),
    ({"scales": torch.zeros(ROWS, 3, dtype=torch.uint8)}, r"scales\.dtype is torch\.uint8"),
    ({"scales": torch.zeros(ROWS, 3, device="meta")}, r"scales\.device is meta"),
    (
        {"x": torch.zeros(ROWS, 56, dtype=torch.uint8)[:, :48]},
        "x row stride is 56.*multiple of 16 elements",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPAQUE)
def test_opaque_dispatch_refuses(change: dict[str, Any], message: str) -> None:
    (buffer,) = virtual_ranks(OPAQUE, 1, "host")
    with buffer:
        good = {"x": torch.zeros(ROWS, 48, dtype=torch.uint8), "scales": torch.zeros(ROWS, 3)}
        with pytest.raises(ShapeError, match=message):
            dispatch(buffer, **{**good, **change})
        dispatch(buffer, **good).wait()


def test_scale_formats_that_are_none_are_refused(buffers: list[Buffer], alone: Buffer) -> None:
    for buffer, rows in ((buffers[0], "fp8"), (alone, "bf16"), (alone, "fp8")):
        with pytest.raises(ConfigError, match="scale_format='float'.*float32, ue8m0"):
            buffer.new_receive(dispatch_format=rows, scale_format="float")  # type: ignore[arg-type]
        for good in ("float32", "ue8m0"):
            into = buffer.new_receive(dispatch_format=rows, scale_format=good)  # type: ignore[arg-type]
            assert into.scale_format == good


def test_opaque_rows_keep_their_scales() -> None:
    """ep_runtime would write no exponents for rows that it did not quantise."""
    (buffer,) = virtual_ranks(OPAQUE, 1, "host")
    with buffer:
        for wrong in ("ue8m0", "bogus"):
            with pytest.raises(ConfigError, match=f"scale_format='{wrong}'"):
                buffer.new_receive(scale_format=wrong)  # type: ignore[arg-type]
        x = torch.zeros(ROWS, 48, dtype=torch.uint8)
        scales = torch.arange(3 * ROWS, dtype=torch.int32).view(ROWS, 3)
        idx = torch.tensor([[2, -1, -1, -1]] * ROWS)
        for same in (None, "float32"):
            into = buffer.new_receive(scale_format=same)  # type: ignore[arg-type]
            got = dispatch(buffer, x=x, topk_idx=idx, scales=scales, out=into).wait()
            assert torch.equal(got.scales[2, :ROWS], scales)


def test_chains_that_are_none_are_refused(buffers: list[Buffer]) -> None:
    buffer = buffers[0]
    for wrong in (-1, CONFIG.num_chains, 10**9):
        for query in (buffer.stats, buffer.stats_region, buffer.epochs):
            with pytest.raises(ConfigError, match=f"chain={wrong}: the chains are 0 .. 1"):
                query(wrong)
    buffer.stats_region(CONFIG.num_chains - 1)


BAD_TALLIES: list[tuple[dict[str, Any], str]] = [
    (
        {"cumulative_recv_count": torch.zeros(4)},
        r"cumulative_recv_count\.dtype is torch\.float32.*int32",
    ),
    (
        {"cumulative_recv_count": torch.zeros(8, dtype=torch.int32)},
        r"cumulative_recv_count\.shape is \[8\].*\[4\]",
    ),
    (
        {"cumulative_recv_count": torch.zeros(8, dtype=torch.int32)[::2]},
        r"cumulative_recv_count\.stride",
    ),
    ({"wait_ns": torch.zeros(2, dtype=torch.int32)}, r"wait_ns\.dtype is torch\.int32.*int64"),
    ({"wait_ns": torch.zeros(4, dtype=torch.int64)}, r"wait_ns\.shape is \[4\].*\[2\]"),
    ({"wait_ns": torch.zeros(2, dtype=torch.int64, device="meta")}, r"wait_ns\.device is meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TALLIES)
def test_tallies_are_checked(buffers: list[Buffer], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        dispatch(buffers[0], **change)
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    if "wait_ns" in change:
        with pytest.raises(ShapeError, match=message):
            buffers[0].combine(bf16(4, 32, 256), received[0].handle, **change)


def test_weights_come_with_the_dispatch_or_with_every_combine(alone: Buffer) -> None:
    y = bf16(8, 16, 256)
    early = dispatch(alone).wait().handle
    with pytest.raises(ShapeError, match="topk_weights is a tensor.*had its weights"):
        alone.combine(y, early, topk_weights=torch.zeros(ROWS, 4))
    late = dispatch(alone, topk_weights=None).wait().handle
    with pytest.raises(ShapeError, match="topk_weights is None.*had none"):
        alone.combine(y, late)
    with pytest.raises(ShapeError, match=r"topk_weights\.shape"):
        alone.combine(y, late, topk_weights=torch.zeros(ROWS + 1, 4))
    with pytest.raises(ShapeError, match=r"topk_weights\.dtype"):
        alone.combine(y, late, topk_weights=torch.zeros(ROWS, 4, dtype=torch.float64))
    alone.combine(y, late, topk_weights=torch.zeros(ROWS, 4)).wait()


def test_compact_hands_weights_to_experts_and_cannot_have_them_late() -> None:
    (buffer,) = virtual_ranks(replace(CONFIG, recv_format="compact"), 1, "host")
    with buffer, pytest.raises(ShapeError, match="topk_weights is None.*'compact'"):
        dispatch(buffer, topk_weights=None)


def test_more_scales_than_kernels_address_are_refused() -> None:
    config = EpConfig(
        num_experts=1024,
        topk=8,
        hidden=4096,
        max_tokens=8192,
        dispatch_format="opaque",
        opaque_row_bytes=4096,
        opaque_scale_words=448,
        recv_format="batched",
    )
    rows = ("opaque", "float32", False, False)
    with pytest.raises(ConfigError, match=r"3758096384 words.*at most 2147483647.*contiguous"):
        allocate_receive(config, 8, torch.device("meta"), object(), Uses(), *rows)
