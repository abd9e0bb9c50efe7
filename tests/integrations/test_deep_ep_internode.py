"""Normal calls of groups that span nodes: declared ones, of four CPU processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from normal_cases import Flow, Sent, Wanted, open_buffer, tokens, wanted_here
from traffic import Sizes, Tokens, calc_diff

from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.integrations.deep_ep import Buffer, Config
from ep_runtime.integrations.deep_ep.normal import DispatchHandle

SIZES = Sizes(num_experts=8, topk=3, hidden=512, max_tokens=60)
PER_NODE = 2
LIMIT = 5e-6


@pytest.fixture(scope="module")
def nodes() -> Iterator[RankPool]:
    pool = RankPool(4, False, {"EP_WARMUP_TIMEOUT_S": "30", "EP_RANKS_PER_NODE": str(PER_NODE)})
    yield pool
    pool.stop()


def round_trips(rank: Rank, seed: int, asynchronous: bool) -> None:
    buffer, flow = open_buffer(rank, SIZES.hidden), Flow(asynchronous)
    num_nodes = rank.num_ranks // PER_NODE
    for turn in range(4):
        everyone = tokens(seed + turn, rank, SIZES)
        own = everyone[rank.rank]
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            own.topk_idx, SIZES.num_experts, **flow.arguments()
        )
        flow.done(event)
        of_node = SIZES.num_experts // num_nodes
        assert per_node is not None
        assert per_node.tolist() == [
            int(((own.topk_idx // of_node == n) & (own.topk_idx >= 0)).any(1).sum())
            for n in range(num_nodes)
        ]
        # dispatch() and internode_dispatch() are the same there.
        call = (buffer.dispatch, buffer.internode_dispatch)[turn % 2]
        worst = rank.num_ranks * 64 if turn == 2 else 0
        x, idx, weights, counts, handle, event = call(
            own.x,
            None,
            per_rank,
            per_node,
            in_rank,
            per_expert,
            own.topk_idx,
            own.weights,
            1,
            worst,
            **flow.arguments(),
        )
        flow.done(event)
        assert isinstance(x, torch.Tensor)
        assert handle is not None
        rows = check_handle(rank, handle, per_node, per_rank, own.x.shape[0])
        wanted = rows_wanted(rank, everyone)
        assert rows == len(wanted.token)
        assert x.shape[0] == (worst or rows)
        assert torch.equal(x[:rows], wanted.x)
        assert idx is not None
        assert weights is not None
        assert torch.equal(idx[:rows], wanted.topk_idx)
        assert (idx[rows:] == -1).all()
        assert torch.equal(weights[:rows], wanted.weights)
        assert counts == ([] if worst else [int((idx == e).sum()) for e in range(2)])
        again, *nothing, event = buffer.internode_dispatch(own.x, handle, **flow.arguments())
        flow.done(event)
        assert nothing == [None] * 4
        assert isinstance(again, torch.Tensor)
        assert torch.equal(again[:rows], x[:rows])
        back = (buffer.combine, buffer.internode_combine)[turn % 2]
        y, sums, event = back(x, handle, weights, **flow.arguments())
        flow.done(event)
        assert sums is not None
        owners = own.topk_idx.clamp(min=-1) // (SIZES.num_experts // rank.num_ranks)
        ranks = torch.stack(
            [((owners == r) & (own.topk_idx >= 0)).any(1) for r in range(rank.num_ranks)], dim=1
        ).sum(1, keepdim=True)
        assert calc_diff(y.double(), own.x.double() * ranks) < LIMIT
        assert torch.allclose(sums, torch.where(own.topk_idx >= 0, own.weights, 0.0), atol=1e-6)
    buffer.destroy()


def rows_wanted(rank: Rank, everyone: list[Tokens]) -> Wanted:
    nothing: list[Any] = [None] * 7
    return wanted_here(rank, Sent(everyone, everyone[rank.rank], SIZES, *nothing))


def check_handle(
    rank: Rank, handle: DispatchHandle, per_node: torch.Tensor, per_rank: torch.Tensor, tokens: int
) -> int:
    """The ten tensors; returns the rows that this rank received."""
    assert len(handle) == 10
    num_nodes = rank.num_ranks // PER_NODE
    shapes = [list(one.shape) for one in handle]
    rail_rows = shapes[9][0]
    assert shapes[:7] == [
        [tokens, rank.num_ranks],
        [num_nodes, 1],
        [rank.num_ranks, 1],
        [num_nodes, 1],
        [num_nodes],
        [rank.num_ranks, 1],
        [rank.num_ranks],
    ]
    assert shapes[8] == [tokens, num_nodes]
    assert shapes[9] == [rail_rows, PER_NODE]
    assert torch.equal(handle[1].flatten(), per_node)
    assert torch.equal(handle[2].flatten(), per_rank)
    assert int(handle[4][-1]) <= rail_rows
    return int(handle[6][-1])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_round_trip(nodes: RankPool, seed: int, asynchronous: bool) -> None:
    nodes.run(round_trips, seed, asynchronous)


def bad_calls(rank: Rank, seed: int) -> None:
    buffer = open_buffer(rank, SIZES.hidden)
    own = tokens(seed, rank, SIZES)[rank.rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.topk_idx, 8)
    with pytest.raises(ShapeError, match="num_tokens_per_rdma_rank"):
        buffer.internode_dispatch(
            own.x, None, per_rank, None, in_rank, per_expert, own.topk_idx, own.weights
        )
    buffer.destroy()


def test_tokens_per_node_are_needed(nodes: RankPool, seed: int) -> None:
    nodes.run(bad_calls, seed)


def one_node(rank: Rank, seed: int) -> None:
    buffer = open_buffer(rank, SIZES.hidden)
    own = tokens(seed, rank, SIZES)[rank.rank]
    buffer.get_dispatch_layout(own.topk_idx, 8)
    with pytest.raises(ConfigError, match="EP_RANKS_PER_NODE"):
        buffer.internode_dispatch(own.x)
    with pytest.raises(ConfigError, match="one node"):
        buffer.internode_combine(own.x, None)  # type: ignore[arg-type]
    buffer.destroy()


def test_one_node_has_no_internode_calls(pair: RankPool, seed: int) -> None:
    pair.run(one_node, seed)


def test_size_hint_of_rdma_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, row = Config(), 7168 * 2
    assert config.get_rdma_buffer_size_hint(row, 8) == 0
    two, four = (config.get_rdma_buffer_size_hint(row, ranks) for ranks in (16, 32))
    assert two % 128 == 0
    assert 4096 * row * 2 < two < four
    monkeypatch.setenv("EP_RANKS_PER_NODE", "2")
    assert config.get_rdma_buffer_size_hint(row, 2) == 0
    assert config.get_rdma_buffer_size_hint(row, 4) == pytest.approx(two, rel=0.01)


def test_calls_take_the_arguments_of_dispatch_and_combine() -> None:
    for name in ("dispatch", "combine"):
        plain = inspect.signature(getattr(Buffer, name)).parameters
        between = inspect.signature(getattr(Buffer, f"internode_{name}")).parameters
        assert list(plain) == list(between)
        assert [p.default for p in plain.values()] == [p.default for p in between.values()]
