"""Graphs of virtual ranks on one GPU, while ranks are masked and unmasked: captured once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drivers import CapturedPair
from groups import VirtualGroup
from support import check_combined, check_received, new_rng, random_input, random_outputs

from ep_runtime import EpConfig, reference

pytestmark = pytest.mark.gpu

CONFIG = EpConfig(num_experts=16, topk=4, hidden=1152, max_tokens=24)
RANKS = 4


@pytest.fixture
def group() -> Iterator[VirtualGroup]:
    made = VirtualGroup(CONFIG, RANKS, "cuda", (0,))
    made.dispatch([random_input(torch.Generator(), CONFIG, 3) for _ in range(RANKS)])
    yield made
    made.close()


def replay(pair: CapturedPair, rng: torch.Generator, masked: set[int]) -> None:
    """Right on the ranks that are left; the masked ones get zeros."""
    inputs = [random_input(rng, CONFIG, pair.rows) for _ in range(RANKS)]
    counted = reference.without(CONFIG, inputs, masked)
    expected = reference.dispatch(CONFIG, counted)
    outputs = random_outputs(rng, expected)
    for rank in range(RANKS):
        pair.load(rank, inputs[rank], outputs[rank])
    pair.graph.replay()
    ordered = reference.combine_in_order(CONFIG, counted, outputs)
    for rank in range(RANKS):
        received, out = pair.results(rank)
        if rank in masked:
            assert (received.recv_count == 0).all()
            assert (out == 0).all()
            continue
        check_received([received], [expected[rank]])
        ordered[rank] = out
    check_combined(ordered, CONFIG, counted, outputs)


def mask(group: VirtualGroup, peer: int, masked: bool) -> None:
    for driver in group.drivers:
        driver.buffer.set_rank_mask(peer, masked)


def test_replays_see_the_mask_of_their_time(group: VirtualGroup) -> None:
    rng = new_rng()
    pairs = [CapturedPair(group.drivers, rows, chain) for rows, chain in ((16, 0), (5, 1))]
    masked: set[int] = set()
    for turn in range(24):
        if turn % 3 == 2:
            peer = int(torch.randint(RANKS, (), generator=rng))
            masked ^= {peer}
            mask(group, peer, peer in masked)
        replay(pairs[turn % 2], rng, masked)


def test_changes_of_the_mask_are_captured(group: VirtualGroup) -> None:
    rng = new_rng()
    pair = CapturedPair(group.drivers, 8, 0)
    told = torch.zeros(RANKS, dtype=torch.int32, device="cuda")
    changes = {}
    for masked in (True, False):
        changes[masked] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(changes[masked]):
            mask(group, 2, masked)
            group.drivers[0].buffer.rank_mask(told)
    replay(pair, rng, set())  # capturing changed nothing
    for _ in range(3):
        changes[True].replay()
        assert told.tolist() == [0, 0, 1, 0]
        replay(pair, rng, {2})
        changes[False].replay()
        assert told.tolist() == [0] * RANKS
        replay(pair, rng, set())
