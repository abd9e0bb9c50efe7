"""What reset() leaves of what was in flight, and what close() leaves where the device failed."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from good_calls import CONFIG, bf16, dispatch

from ep_runtime import Buffer, CudaError, SequenceError, ShapeError, virtual_ranks
from ep_runtime.memory import base
from ep_runtime.rank import OpRecord


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    (made,) = virtual_ranks(replace(CONFIG, dispatch_format="bf16"), 1, "host")
    with made:
        yield made


def test_what_reset_dropped_is_not_waited_for(buffer: Buffer) -> None:
    """It would wait for rows that nobody sends, until the time budget ends the group."""
    received = dispatch(buffer, out=buffer.new_receive()).wait()
    pending = [
        dispatch(buffer),
        dispatch(buffer, chain=1),
        buffer.combine(bf16(8, 16, 256), received.handle),
    ]
    buffer.reset()
    started = time.monotonic()
    for one in pending:
        assert not one.waited
        assert "dropped" in repr(one)
        with pytest.raises(SequenceError, match=r"dropped by reset\(\).*send again"):
            one.wait()
    assert time.monotonic() - started < buffer.time_budget_s / 2
    buffer.check()  # and nothing is on record


def test_what_reset_dropped_does_not_take_what_is_sent_next(buffer: Buffer) -> None:
    old = dispatch(buffer)
    buffer.reset()
    new = dispatch(buffer, topk_idx=torch.tensor([[0, 1, 2, 3]] * 5))
    with pytest.raises(SequenceError, match="dropped"):
        old.wait()
    received = new.wait()
    assert received.recv_count.tolist() == [5, 5, 5, 5, 0, 0, 0, 0]
    back = buffer.combine(bf16(8, 16, 256), received.handle)
    buffer.reset()
    again = buffer.combine(bf16(8, 16, 256), dispatch(buffer).wait().handle)
    with pytest.raises(SequenceError, match="combine of chain 0 that was dropped"):
        back.wait()
    again.wait()


def test_a_refused_launch_leaves_the_handle_before_it(buffer: Buffer) -> None:
    received = dispatch(buffer).wait()

    def refuse(record: OpRecord) -> NoReturn:
        raise RuntimeError(f"no {record.kind}")

    buffer.recorder = refuse
    for launch in (
        lambda: dispatch(buffer),
        lambda: buffer.dispatch_fused(bf16(1, 256), torch.full((1, 4), -1), torch.zeros(1, 4)),
    ):
        with pytest.raises(RuntimeError, match="no dispatch_"):
            launch()
    buffer.recorder = None
    assert not received.handle.stale
    buffer.combine(bf16(8, 16, 256), received.handle).wait()
    newer = dispatch(buffer).wait()
    assert received.handle.stale
    assert not newer.handle.stale


def test_a_close_that_fails_keeps_the_memory_and_closes(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise CudaError("cudaDeviceSynchronize: unspecified launch failure")

    memory = [*buffer._memory.mappings, *buffer._memory.owned]
    assert memory
    monkeypatch.setattr(buffer._ops, "synchronize", fail)
    with pytest.raises(CudaError, match="unspecified launch failure"):
        buffer.close()
    kept = {id(one) for one in base._kept}
    assert all(id(one) in kept for one in memory)
    buffer.close()  # again: nothing
    with pytest.raises(SequenceError, match="closed Buffer"):
        dispatch(buffer)


def test_what_was_sent_says_how_to_get_at_what_came(buffer: Buffer) -> None:
    pending = dispatch(buffer)
    for name in ("x", "handle", "float"):
        assert not hasattr(pending, name)
        with pytest.raises(AttributeError, match=rf"no '{name}': call wait\(\)"):
            getattr(pending, name)
    assert pending.wait().x is not None


def test_what_a_receive_adds_to_lives_until_it_is_waited_for(buffer: Buffer) -> None:
    """The receive has nothing but its address."""
    counts = torch.zeros(8, dtype=torch.int32)
    waited = torch.zeros(1, dtype=torch.int64)
    kept = [weakref.ref(counts), weakref.ref(waited)]
    received = dispatch(buffer, cumulative_recv_count=counts, wait_ns=waited).wait()
    pending = dispatch(buffer, cumulative_recv_count=counts, wait_ns=waited, chain=1)
    home = buffer.combine(bf16(8, 16, 256), received.handle, wait_ns=waited)
    del counts, waited
    gc.collect()
    assert all(one() is not None for one in kept)
    pending.wait()
    home.wait()
    del pending, home
    assert all(one() is None for one in kept)


def test_a_budget_that_is_set_while_patient_stays(buffer: Buffer) -> None:
    buffer.set_time_budget(7.0)
    with buffer.patient():
        assert buffer.time_budget_s == 60.0
    assert buffer.time_budget_s == 7.0
    with buffer.patient():
        buffer.set_time_budget(3.0)
    assert buffer.time_budget_s == 3.0


@pytest.mark.parametrize("seconds", [0, 1e-10, 1e9, float("nan"), "5", True])
def test_a_budget_is_a_number_of_seconds(buffer: Buffer, seconds: object) -> None:
    with pytest.raises(ShapeError, match="it must be a number from"):
        buffer.set_time_budget(seconds)  # type: ignore[arg-type]


def test_statistics_of_a_closed_buffer_are_gone(buffer: Buffer) -> None:
    assert buffer.stats_region(0)[1] > 0
    buffer.close()
    with pytest.raises(SequenceError, match="closed Buffer"):
        buffer.stats_region(0)


def test_receive_tensors_made_in_inference_mode_are_ordinary_ones(buffer: Buffer) -> None:
    with torch.inference_mode():
        into = buffer.new_receive()
    assert not into.received.x.is_inference()
    assert not into.received.handle.routing.is_inference()


def test_what_is_received_is_compared_as_an_object(buffer: Buffer) -> None:
    received = dispatch(buffer).wait()
    assert received in [received]
    assert {received.handle: 1}[received.handle] == 1


def test_a_closed_buffer_gives_no_addresses_and_waits_for_nothing(buffer: Buffer) -> None:
    pending = dispatch(buffer)
    buffer.close()
    for _ in range(2):
        with pytest.raises(SequenceError, match="closed"):
            pending.wait()
        assert not pending.waited
    with pytest.raises(SequenceError, match="closed"):
        buffer.heap_regions()


@pytest.mark.parametrize("masked", ["no", None, 2, 1])
def test_a_rank_is_masked_or_not(buffer: Buffer, masked: Any) -> None:
    with pytest.raises(ShapeError, match="masked=.*True or False"):
        buffer.set_rank_mask(0, masked)
    with pytest.raises(ShapeError, match="out is a list"):
        buffer.rank_mask([0])  # type: ignore[arg-type]
    assert buffer.masked_ranks() == []
