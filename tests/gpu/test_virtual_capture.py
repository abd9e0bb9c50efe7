"""Captured operations of virtual ranks on one GPU: any graph, in any order, with eager calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drivers import CapturedPair
from groups import VirtualGroup
from support import (
    check_combined,
    check_received,
    new_rng,
    random_counts,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference
from ep_runtime.reference import RankInput

pytestmark = pytest.mark.gpu

CONFIG = EpConfig(num_experts=16, topk=4, hidden=512, max_tokens=24)
RANKS = 4


@pytest.fixture
def group() -> Iterator[VirtualGroup]:
    made = VirtualGroup(CONFIG, RANKS, "cuda", (0,))
    eager(made, torch.Generator().manual_seed(0))  # loads every kernel before a capture
    yield made
    made.close()


def eager(group: VirtualGroup, rng: torch.Generator, chain: int = 0) -> None:
    inputs = random_inputs(rng, CONFIG, RANKS, padded=True)
    expected = reference.dispatch(CONFIG, inputs)
    check_received(group.dispatch(inputs, chain), expected)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs, chain), CONFIG, inputs, outputs)


def inputs_of(rng: torch.Generator, most: int) -> list[RankInput]:
    """Another number of tokens on every rank, up to the bucket's."""
    return [random_input(rng, CONFIG, rows) for rows in random_counts(rng, RANKS, most)]


def replay(pair: CapturedPair, rng: torch.Generator) -> None:
    inputs = inputs_of(rng, pair.rows)
    expected = reference.dispatch(CONFIG, inputs)
    outputs = random_outputs(rng, expected)
    for rank in range(RANKS):
        pair.load(rank, inputs[rank], outputs[rank])
    pair.graph.replay()
    results = [pair.results(rank) for rank in range(RANKS)]
    check_received([received for received, _ in results], expected)
    check_combined([out for _, out in results], CONFIG, inputs, outputs)


@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "a stream per rank"])
def test_replays_give_the_references_results(group: VirtualGroup, own_streams: bool) -> None:
    rng = new_rng()
    pair = CapturedPair(group.drivers, 16, 0, own_streams=own_streams)
    for _ in range(20):
        replay(pair, rng)


def test_graphs_of_two_buckets_and_chains_mix_with_eager_calls(group: VirtualGroup) -> None:
    rng = new_rng()
    pairs = [CapturedPair(group.drivers, rows, chain) for rows, chain in ((24, 0), (4, 0), (8, 1))]
    for _ in range(60):
        choice = int(torch.randint(5, (), generator=rng))
        if choice < 3:
            replay(pairs[choice], rng)
        else:
            eager(group, rng, choice - 3)


def test_replays_back_to_back_need_no_host(group: VirtualGroup) -> None:
    """Many replays in a row, unsynchronised: the last one's results are right."""
    rng = new_rng()
    pair = CapturedPair(group.drivers, 24, 0)
    inputs = inputs_of(rng, 24)
    expected = reference.dispatch(CONFIG, inputs)
    outputs = random_outputs(rng, expected)
    for rank in range(RANKS):
        pair.load(rank, inputs[rank], outputs[rank])
    for _ in range(200):
        pair.graph.replay()
    results = [pair.results(rank) for rank in range(RANKS)]
    check_received([received for received, _ in results], expected)
    check_combined([out for _, out in results], CONFIG, inputs, outputs)
    epochs = group.all("query", "epochs", 0)
    assert len(set(epochs)) == 1
    assert epochs[0][0] == epochs[0][1] >= 200


def test_dispatch_graph_is_combined_eagerly(group: VirtualGroup) -> None:
    """A graph with an odd number of operations leaves the chain where a combine takes it up."""
    rng = new_rng()
    x = [torch.zeros(8, 512, dtype=torch.bfloat16, device="cuda") for _ in range(RANKS)]
    idx = [torch.full((8, 4), -1, device="cuda") for _ in range(RANKS)]
    weights = [torch.zeros(8, 4, device="cuda") for _ in range(RANKS)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    buffers = [driver.buffer for driver in group.drivers]
    with torch.cuda.graph(graph):
        sent = [b.dispatch(x[r], idx[r], weights[r]) for r, b in enumerate(buffers)]
        received = [pending.wait() for pending in sent]
    for _ in range(5):
        inputs = [random_input(rng, CONFIG, 8) for _ in range(RANKS)]
        for rank, one in enumerate(inputs):
            x[rank].copy_(one.x)
            idx[rank].copy_(one.topk_idx)
            weights[rank].copy_(one.topk_weights)
            group.drivers[rank]._poison_inbox(0)
            group.drivers[rank].handles[0] = received[rank].handle
        graph.replay()
        group.all("check")
        got = [group.drivers[rank]._snapshot(received[rank]) for rank in range(RANKS)]
        expected = reference.dispatch(CONFIG, inputs)
        check_received(got, expected)
        outputs = random_outputs(rng, expected)
        check_combined(group.combine(outputs), CONFIG, inputs, outputs)
