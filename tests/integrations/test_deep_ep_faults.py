"""Ranks that do not come, or come with something else: named errors within the time budget."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import Format, check_received, combine, dispatch, open_buffer
from normal_cases import Flow, tokens
from normal_cases import dispatch as normal_dispatch
from normal_cases import open_buffer as open_normal
from traffic import Sizes

from ep_runtime.errors import ConfigError, PeerTimeout

SIZES = Sizes(num_experts=8, topk=2, hidden=512, max_tokens=8)
BUDGET_S = 2.0


@pytest.fixture
def impatient() -> Iterator[RankPool]:
    """Two CPU ranks that give each other two seconds."""
    pool = RankPool(2, environment={"EP_WARMUP_TIMEOUT_S": str(BUDGET_S)})
    yield pool
    pool.stop()


def timed_out(rank: Rank, seed: int, mode: str) -> tuple[str, int, float] | None:
    """Rank 1 stays away from the second dispatch."""
    buffer = open_buffer(rank, SIZES)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, Format(), mode))
    rank.barrier()
    if rank.rank == 1:
        return None
    started = time.monotonic()
    with pytest.raises(PeerTimeout) as raised:
        dispatch(rank, buffer, SIZES, seed, Format(), mode)
    took = time.monotonic() - started
    with pytest.raises(PeerTimeout):  # until the group is built anew
        buffer.clean_low_latency_buffer(SIZES.max_tokens, SIZES.hidden, SIZES.num_experts)
    return str(raised.value), raised.value.peer, took


@pytest.mark.parametrize("mode", ["plain", "hook"])
def test_a_rank_that_stays_away_is_named(impatient: RankPool, seed: int, mode: str) -> None:
    text, peer, took = impatient.run(timed_out, seed, mode)[0]
    assert peer == 1
    assert "rank 1" in text
    assert BUDGET_S * 0.9 < took < BUDGET_S + 3


def shrunk(rank: Rank, seed: int) -> None:
    """Rank 1 stays away for good: rank 0 masks it and goes on."""
    buffer = open_buffer(rank, SIZES, enable_shrink=True)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, Format(), "plain"))
    rank.barrier()
    if rank.rank == 1:
        return
    with pytest.raises(PeerTimeout) as raised:
        dispatch(rank, buffer, SIZES, seed, Format(), "plain")
    buffer.low_latency_update_mask_buffer(raised.value.peer, True)
    buffer.clean_low_latency_buffer(SIZES.max_tokens, SIZES.hidden, SIZES.num_experts)
    for turn in range(3):
        sent = dispatch(rank, buffer, SIZES, seed + turn, Format(), "hook", masked={1})
        check_received(rank, sent)
        combine(rank, buffer, sent, "hook")


def test_the_other_goes_on_without_a_rank_that_is_gone(impatient: RankPool, seed: int) -> None:
    impatient.run(shrunk, seed)


def normal_timed_out(rank: Rank, seed: int) -> tuple[int, float] | None:
    buffer, flow = open_normal(rank, SIZES.hidden), Flow(False)
    normal_dispatch(rank, buffer, tokens(seed, rank, SIZES), SIZES, flow)
    rank.barrier()
    if rank.rank == 1:
        return None
    started = time.monotonic()
    with pytest.raises(PeerTimeout) as raised:
        normal_dispatch(rank, buffer, tokens(seed, rank, SIZES), SIZES, flow)
    return raised.value.peer, time.monotonic() - started


def test_a_rank_that_stays_away_from_a_normal_call_is_named(impatient: RankPool, seed: int) -> None:
    peer, took = impatient.run(normal_timed_out, seed)[0]
    assert peer == 1
    assert BUDGET_S * 0.9 < took < BUDGET_S + 3


def disagreeing(rank: Rank) -> str:
    """Each rank thinks of another number of tokens."""
    buffer = open_buffer(rank, SIZES)
    x = torch.zeros((2, SIZES.hidden), dtype=torch.bfloat16)
    idx = torch.tensor([[0, 7], [1, 6]])
    with pytest.raises(ConfigError) as raised:
        buffer.low_latency_dispatch(x, idx, 8 + rank.rank, SIZES.num_experts)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, 1, Format(), "plain"))  # the group lives
    buffer.destroy()
    return str(raised.value)


def test_ranks_that_disagree_are_told(pair: RankPool) -> None:
    for text in pair.run(disagreeing):
        assert "max_tokens=9" in text
