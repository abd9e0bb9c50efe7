"""A peer that writes nonsense is an error of the group, never an access out of bounds."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ep_runtime import _C, Buffer, DesyncError, EpConfig, virtual_ranks
from ep_runtime.layout import shape_of

CONFIG = EpConfig(num_experts=8, topk=2, hidden=128, max_tokens=4)
FIRST_CHAIN = 128  # bytes: the abort word's line comes first


def overwrite(buffers: list[Buffer], offset: int, value: int) -> None:
    """Set a 32-bit word of rank 0's heap."""
    address = buffers[0]._memory.heaps[0] + offset
    ctypes.c_uint32.from_address(address).value = value


@pytest.fixture
def sent() -> list[Buffer]:
    """Two ranks that have dispatched for the first time (epoch 1) and not received."""
    buffers = virtual_ranks(CONFIG, 2, "host")
    for buffer in buffers:
        idx = torch.tensor([[0, 1], [0, 7], [3, 4]])
        pending = buffer.dispatch(torch.ones(3, 128).bfloat16(), idx, torch.ones(3, 2))
        assert not pending.waited
    return buffers


def counts_of_rank_1(word: int) -> int:
    """Offset of a word of the counts message from rank 1 in slot `epoch & 1`."""
    stride = _C.layout(shape_of(CONFIG, 2))["counts_stride"]
    return FIRST_CHAIN + (1 * 2 + 1) * stride + 4 * word


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, 5), (0, 0xFFFFFFFF), (2, 4), (3, 0x80000000)],
    ids=["too many messages", "negative messages", "too many rows", "negative rows"],
)
def test_impossible_counts_end_the_group(sent: list[Buffer], word: int, value: int) -> None:
    overwrite(sent, counts_of_rank_1(word), value)
    with pytest.raises(DesyncError, match=r"rank 1 announced"):
        sent[0]._open["dispatch", 0].wait()  # type: ignore[union-attr]
    with pytest.raises(DesyncError, match="rank 0 got impossible counts from rank 1"):
        sent[1]._open["dispatch", 0].wait()  # type: ignore[union-attr]


def test_reset_repairs_the_heap(sent: list[Buffer]) -> None:
    overwrite(sent, counts_of_rank_1(0), 77)
    with pytest.raises(DesyncError):
        sent[0]._open["dispatch", 0].wait()  # type: ignore[union-attr]
    for buffer in sent:
        buffer.reset()
    idx = torch.tensor([[0, 4]])
    pending = [b.dispatch(torch.ones(1, 128).bfloat16(), idx, torch.ones(1, 2)) for b in sent]
    assert [p.wait().recv_count.tolist() for p in pending] == [[2, 0, 0, 0]] * 2
