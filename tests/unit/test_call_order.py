"""What a call does to others of its rank that are in flight: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from good_calls import CONFIG, bf16, dispatch

from ep_runtime import Buffer, RoutingFault, SequenceError, ShapeError, virtual_ranks
from ep_runtime.rank import OpRecord

BAD = torch.full((5, 4), 99)


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    (made,) = virtual_ranks(replace(CONFIG, dispatch_format="bf16"), 1, "host")
    with made:
        yield made


def test_bad_routes_do_not_come_between_a_step_and_its_end(buffer: Buffer) -> None:
    """Peers are in the same step: a rank that leaves it would keep them waiting."""
    pending = dispatch(buffer, topk_idx=BAD)
    other = dispatch(buffer, chain=1)
    received = pending.wait()
    dispatch(buffer, out=buffer.new_receive()).wait()  # chain 1 is still to be received
    buffer.combine(bf16(8, 16, 256), received.handle).wait()
    other.wait()
    with pytest.raises(RoutingFault, match="20 entries"):
        dispatch(buffer)
    dispatch(buffer).wait()  # raised once


def test_a_wait_that_is_refused_is_not_recorded() -> None:
    first, second = virtual_ranks(replace(CONFIG, dispatch_format="bf16"), 2, "host")
    recorded: list[str] = []

    def record(one: OpRecord) -> None:
        recorded.append(one.kind)

    first.recorder = record
    pending = dispatch(first)
    with pytest.raises(SequenceError, match="issue every rank's"):
        pending.wait()
    late = dispatch(second)
    pending.wait()
    late.wait()
    assert recorded == ["dispatch_send", "dispatch_recv"]
    first.close()
    second.close()


def test_fused_calls_refuse_what_they_would_read_and_write(buffer: Buffer) -> None:
    into = buffer.new_receive()
    rows = into.received.x.view(-1, 256)[:5]
    with pytest.raises(ShapeError, match="the memory of x is in that of what is received"):
        buffer.dispatch_fused(rows, torch.full((5, 4), -1), torch.zeros(5, 4), out=into)
    received = buffer.dispatch_fused(
        bf16(5, 256), torch.full((5, 4), -1), torch.zeros(5, 4), out=into
    )
    y = bf16(8, 16, 256)
    with pytest.raises(ShapeError, match="the memory of out is in that of y"):
        buffer.combine_fused(y, received.handle, out=y.view(-1, 256)[3:8])
    buffer.combine_fused(y, received.handle)
