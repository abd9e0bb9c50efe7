"""A buffer that cannot grow stays what it was; one that cannot close properly is closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ranks import ThreadGroup

from ep_runtime import ConfigError, CudaError, SequenceError
from ep_runtime.memory import base
from ep_runtime.normal import NormalBuffer

SIZES = {"max_tokens": 16, "max_hidden": 256, "max_experts": 64, "max_topk": 8}


@pytest.fixture(params=[None, 1], ids=["flat", "nodes"])
def group(request: pytest.FixtureRequest) -> Iterator[ThreadGroup]:
    """Two ranks, or two nodes of a rank each."""
    made = ThreadGroup(2, "host", None, **SIZES, ranks_per_node=request.param)
    yield made
    made.close()


def configs(group: ThreadGroup) -> list[Any]:
    return [one.config for buffer in group.buffers for one in (buffer, *buffer._parts)]


def reserve(buffer: NormalBuffer, max_tokens: int) -> None:
    buffer.reserve(max_tokens=max_tokens)


def test_a_reserve_out_of_range_changes_nothing(group: ThreadGroup) -> None:
    before = configs(group)
    for wrong in ((1 << 20) + 1, 64.0, 0, -1, True, 2.5, float("nan"), "x"):
        for outcome in group.outcomes(reserve, [(wrong,)] * 2):
            assert isinstance(outcome, ConfigError), outcome
            assert "max_tokens" in str(outcome)
    assert configs(group) == before


def test_a_product_out_of_range_changes_nothing() -> None:
    """Each number may be as large, but not on two nodes."""
    group = ThreadGroup(2, "host", None, **SIZES, ranks_per_node=1)
    before = configs(group)
    for outcome in group.outcomes(reserve, [((1 << 19) + 1,)] * 2):
        assert isinstance(outcome, ConfigError), outcome
    assert configs(group) == before
    group.run(reserve, [(64,)] * 2)
    assert [buffer.config.max_tokens for buffer in group.buffers] == [64] * 2
    group.close()


def test_a_reserve_without_memory_changes_nothing(
    group: ThreadGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part of each rank gets no memory, after the others grew."""
    before = configs(group)

    def refuse(_num_bytes: int) -> Any:
        raise CudaError("cudaMalloc: out of memory")

    with monkeypatch.context() as patch:
        for buffer in group.buffers:
            last = (buffer, *buffer._parts)[-1]
            patch.setattr(last, "_provider", refuse)
        for outcome in group.outcomes(reserve, [(30_000,)] * 2):
            assert isinstance(outcome, CudaError), outcome
        assert configs(group) == before
    group.run(reserve, [(30_000,)] * 2)
    assert [buffer.config.max_tokens for buffer in group.buffers] == [30_000] * 2
    assert len({one.max_tokens for one in configs(group)}) <= 2  # shares are counted from 16 again


def fail() -> None:
    raise CudaError("cudaDeviceSynchronize: unspecified launch failure")


@pytest.mark.parametrize("first_part", [True, False])
def test_a_close_that_fails_keeps_the_memory_and_closes(
    group: ThreadGroup, monkeypatch: pytest.MonkeyPatch, first_part: bool
) -> None:
    """first_part  where there are nodes, it already is what cannot be waited for"""
    buffer = group.buffers[0]
    everyone = (buffer, *buffer._parts)
    failing = everyone[1 if first_part and buffer._parts else 0]
    monkeypatch.setattr(failing._ops, "synchronize", fail)
    # Parts that were closed before the whole fails gave theirs back.
    unclosed = everyone if first_part else everyone[:1]
    memories = [m for one in unclosed for m in (one._heap._memory, one._control)]
    held = [piece for one in memories for piece in (*one.mappings, *one.owned)]
    assert held
    held += [one._host_counts for one in unclosed]  # a notify in flight writes there
    with pytest.raises(CudaError, match="unspecified launch failure"):
        buffer.close()
    kept = {id(piece) for piece in base._kept}
    assert all(id(piece) in kept for piece in held)
    buffer.close()  # again: nothing
    for one in everyone:
        with pytest.raises(SequenceError, match="closed"):
            one.check()
