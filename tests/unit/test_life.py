"""What reset() leaves of what was in flight, and what close() leaves where the device failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
from good_calls import CONFIG, bf16, dispatch

from ep_runtime import Buffer, CudaError, SequenceError, virtual_ranks
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
    again = buffer.combine(bf16(8, 16, 256), received.handle)
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
