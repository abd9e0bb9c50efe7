"""Every argument that an operation cannot take is refused before anything is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from good_calls import CONFIG, ROWS, arguments, bf16, dispatch

from ep_runtime import Buffer, SequenceError, ShapeError, virtual_ranks


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    made = virtual_ranks(CONFIG, 2, "host")
    yield made
    for buffer in made:
        buffer.close()


BAD_DISPATCH: list[tuple[dict[str, Any], str]] = [
    ({"x": None}, "x is of type NoneType.*torch.Tensor"),
    ({"x": bf16(ROWS, 256).requires_grad_()}, r"x\.requires_grad.*no_grad.*dispatch_autograd"),
    ({"topk_idx": [[0, 1, 2, 3]] * ROWS}, "topk_idx is of type list"),
    ({"topk_weights": torch.zeros(ROWS, 4).requires_grad_()}, r"topk_weights\.requires_grad"),
    ({"round_scale": 1}, "round_scale=1: it must be True, False or None"),
    ({"wait_ns": [0, 0]}, "wait_ns is of type list"),
    ({"x": torch.zeros(ROWS, 256)}, r"x\.dtype is torch\.float32.*bfloat16"),
    ({"x": bf16(ROWS, 128)}, r"x\.shape is \[5, 128\].*\[T, 256\]"),
    ({"x": bf16(256)}, r"x\.shape is \[256\]"),
    ({"x": bf16(17, 256)}, "x has 17 rows, max_tokens=16.*larger max_tokens"),
    ({"x": bf16(256, ROWS).t()}, r"x\.stride\(-1\).*contiguous"),
    ({"x": bf16(ROWS, 260)[:, :256]}, "x row stride is 260.*multiple of 8"),
    ({"x": bf16(ROWS * 256 + 1)[1:].view(ROWS, 256)}, r"x\.data_ptr.*16 bytes.*clone"),
    ({"x": bf16(ROWS, 256).to("meta")}, r"x\.device is meta.*cpu"),
    (
        {"topk_idx": torch.zeros(ROWS, 3, dtype=torch.long)},
        r"topk_idx\.shape is \[5, 3\].*\[5, 4\]",
    ),
    ({"topk_idx": torch.zeros(4, 4, dtype=torch.long)}, r"topk_idx\.shape is \[4, 4\]"),
    ({"topk_idx": torch.zeros(ROWS, 4, dtype=torch.int16)}, r"topk_idx\.dtype is torch\.int16"),
    ({"topk_idx": torch.zeros(4, ROWS, dtype=torch.long).t()}, r"topk_idx\.stride.*contiguous"),
    ({"topk_idx": torch.zeros(ROWS, 4, dtype=torch.long, device="meta")}, r"topk_idx\.device"),
    ({"topk_weights": torch.zeros(ROWS, 4, dtype=torch.float64)}, r"topk_weights\.dtype"),
    ({"topk_weights": torch.zeros(ROWS, 5)}, r"topk_weights\.shape"),
    ({"topk_weights": torch.zeros(ROWS, 8)[:, ::2]}, r"topk_weights\.stride"),
    ({"num_tokens": 3}, "num_tokens is int.*int32 tensor"),
    ({"num_tokens": torch.tensor(3)}, r"num_tokens\.dtype is torch\.int64.*int32"),
    ({"num_tokens": torch.zeros(2, dtype=torch.int32)}, r"num_tokens\.shape is \[2\]"),
    ({"num_tokens": torch.zeros((), dtype=torch.int32, device="meta")}, r"num_tokens\.device"),
    ({"expected_tokens": 17}, "expected_tokens=17.*16"),
    ({"expected_tokens": 2.5}, "expected_tokens=2.5: it must be an int"),
    ({"expected_tokens": torch.tensor(3)}, "expected_tokens=tensor"),
    ({"chain": True}, "chain=True"),
    ({"chain": 2}, r"chain=2.*0 \.\. 1.*num_chains"),
    ({"chain": -1}, "chain=-1"),
    ({"chain": 1.0}, r"chain=1\.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_DISPATCH)
def test_dispatch_refuses(buffers: list[Buffer], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        dispatch(buffers[0], **change)
    # Nothing was launched: the chain takes a good dispatch.
    pending = [dispatch(buffer) for buffer in buffers]
    for one in pending:
        one.wait()


BAD_COMBINE: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"y": torch.zeros(4, 32, 256)}, r"y\.dtype is torch\.float32"),
    (lambda: {"y": bf16(4, 31, 256)}, r"y\.shape is \[4, 31, 256\].*\[4, 32, 256\].*batched"),
    (lambda: {"y": bf16(4 * 32, 256)}, r"y\.shape"),
    (lambda: {"y": bf16(4, 256, 32).transpose(1, 2)}, r"y\.stride\(-1\)"),
    (lambda: {"y": bf16(4, 33, 256)[:, :32]}, r"y\.stride\(0\) is 8448.*8192"),
    (lambda: {"y": bf16(4, 32, 256).to("meta")}, r"y\.device"),
    (lambda: {"out": torch.zeros(ROWS, 256)}, r"out\.dtype"),
    (lambda: {"out": bf16(ROWS + 1, 256)}, r"out\.shape is \[6, 256\].*\[5, 256\]"),
    (lambda: {"out": bf16(ROWS, 512)[:, :256]}, r"out\.stride"),
    (lambda: {"out": bf16(ROWS, 256).to("meta")}, r"out\.device"),
    (lambda: {"handle": "chain 0"}, r"handle is str.*received\.handle"),
]


@pytest.mark.parametrize(("change", "message"), BAD_COMBINE)
def test_combine_refuses(
    buffers: list[Buffer], change: Callable[[], dict[str, Any]], message: str
) -> None:
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    given: dict[str, Any] = {"y": bf16(4, 32, 256), "handle": received[0].handle, "out": None}
    given.update(change())
    with pytest.raises(ShapeError, match=message):
        buffers[0].combine(given["y"], given["handle"], out=given["out"])
    back = [b.combine(bf16(4, 32, 256), r.handle) for b, r in zip(buffers, received, strict=True)]
    assert [p.wait().shape for p in back] == [(ROWS, 256)] * 2


def test_handle_of_another_rank_is_refused(buffers: list[Buffer]) -> None:
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    with pytest.raises(SequenceError, match="another Buffer"):
        buffers[0].combine(bf16(4, 32, 256), received[1].handle)


def test_one_row_may_have_any_row_stride(buffers: list[Buffer]) -> None:
    one_row = torch.as_strided(bf16(300), (1, 256), (3, 1))
    arguments_of_one = {
        "x": one_row,
        "topk_idx": torch.zeros(1, 4, dtype=torch.int32).fill_(-1),
        "topk_weights": torch.zeros(1, 4),
    }
    for pending in [dispatch(buffer, **arguments_of_one) for buffer in buffers]:
        pending.wait()


def test_receive_is_waited_for_once(buffers: list[Buffer]) -> None:
    pending = [dispatch(buffer) for buffer in buffers]
    pending[0].wait()
    with pytest.raises(SequenceError, match="called before"):
        pending[0].wait()


def test_second_operation_of_a_kind_needs_the_first_ones_wait(buffers: list[Buffer]) -> None:
    pending = [dispatch(buffer) for buffer in buffers]
    with pytest.raises(SequenceError, match=r"chain 0.*dispatch was not waited for.*wait\(\)"):
        dispatch(buffers[0])
    dispatch(buffers[0], chain=1)  # another chain does not mind
    received = [p.wait() for p in pending]
    back = [b.combine(bf16(4, 32, 256), r.handle) for b, r in zip(buffers, received, strict=True)]
    with pytest.raises(SequenceError, match="combine was not waited for"):
        buffers[0].combine(bf16(4, 32, 256), received[0].handle)
    again = [dispatch(b, out=b.new_receive()) for b in buffers]  # nor does the other kind
    for one in [*back, *again]:
        one.wait()


def test_receive_tensors_are_taken_only_once_nothing_in_flight_needs_them(
    buffers: list[Buffer],
) -> None:
    apart = [buffer.new_receive() for buffer in buffers]
    sent = [dispatch(b, out=into) for b, into in zip(buffers, apart, strict=True)]
    with pytest.raises(SequenceError, match=r"chain 1: a dispatch on chain 0.*new_receive\(\)"):
        dispatch(buffers[0], chain=1, out=apart[0])
    received = [p.wait() for p in sent]
    y = bf16(4, 32, 256)
    back = [b.combine(y, r.handle) for b, r in zip(buffers, received, strict=True)]
    for chain in (0, 1):
        with pytest.raises(SequenceError, match=f"chain {chain}: a combine on chain 0"):
            dispatch(buffers[0], chain=chain, out=apart[0])
    assert not received[0].handle.stale  # nothing was done
    for one in back:
        one.wait()
    for buffer, into in zip(buffers, apart, strict=True):
        dispatch(buffer, chain=1, out=into)
    for buffer in buffers:
        buffer.reset()
    for one in [dispatch(b, out=into) for b, into in zip(buffers, apart, strict=True)]:
        one.wait()


def test_handle_is_stale_once_its_receive_tensors_are_used_again(buffers: list[Buffer]) -> None:
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    old = [one.handle for one in received]
    assert not old[0].stale
    apart = [buffer.new_receive() for buffer in buffers]
    kept = [
        p.wait() for p in [dispatch(b, out=into) for b, into in zip(buffers, apart, strict=True)]
    ]
    assert not old[0].stale  # the other dispatch had tensors of its own
    sent = [dispatch(buffer) for buffer in buffers]
    assert old[0].stale  # from the send on: rows may come at once
    for one in sent:
        one.wait()
    with pytest.raises(SequenceError, match=r"chain 0, 5 rows.*stale.*new_receive\(\)"):
        buffers[0].combine(bf16(4, 32, 256), old[0])
    back = [b.combine(bf16(4, 32, 256), r.handle) for b, r in zip(buffers, kept, strict=True)]
    for one in back:
        one.wait()
    for p in [dispatch(b, out=into) for b, into in zip(buffers, apart, strict=True)]:
        p.wait()
    with pytest.raises(SequenceError, match="stale"):
        buffers[1].combine(bf16(4, 32, 256), kept[1].handle)


def test_a_refused_dispatch_leaves_handles_as_they_are(buffers: list[Buffer]) -> None:
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    with pytest.raises(ShapeError):
        dispatch(buffers[0], x=torch.zeros(ROWS, 256))
    assert not received[0].handle.stale


def test_virtual_rank_waits_only_after_all_have_sent(buffers: list[Buffer]) -> None:
    first = dispatch(buffers[0])
    with pytest.raises(SequenceError, match=r"rank 0 waits.*rank 1.*before any wait"):
        first.wait()
    second = dispatch(buffers[1])
    first.wait()  # refused before, launched now
    second.wait()


def test_fused_operations_are_refused_where_ranks_share_a_device(buffers: list[Buffer]) -> None:
    given = arguments()
    with pytest.raises(SequenceError, match="dispatch_fused on virtual rank 0"):
        buffers[0].dispatch_fused(given["x"], given["topk_idx"], given["topk_weights"])
    received = [p.wait() for p in [dispatch(buffer) for buffer in buffers]]
    with pytest.raises(SequenceError, match="combine_fused on virtual rank 1"):
        buffers[1].combine_fused(bf16(4, 32, 256), received[1].handle)


def test_closed_buffer_refuses_everything(buffers: list[Buffer]) -> None:
    pending = [dispatch(buffer) for buffer in buffers]
    buffers[0].close()
    buffers[0].close()
    for call in (
        lambda: dispatch(buffers[0]),
        lambda: pending[0].wait(),
        lambda: buffers[0].check(),
        lambda: buffers[0].stats(),
        lambda: buffers[0].set_time_budget(1.0),
        lambda: buffers[0].epochs(),
        lambda: buffers[0].reset(),
    ):
        with pytest.raises(SequenceError, match="closed Buffer"):
            call()


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_time_budget_is_finite_and_positive(buffers: list[Buffer], seconds: float) -> None:
    with pytest.raises(ShapeError, match="time budget"):
        buffers[0].set_time_budget(seconds)


def test_budget_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_WARMUP_TIMEOUT_S", "33")
    monkeypatch.setenv("EP_TIMEOUT_S", "7")
    (buffer,) = virtual_ranks(CONFIG, 1, "host")
    with buffer:
        assert buffer.time_budget_s == 33
        buffer.steady()
        assert buffer.time_budget_s == 7
