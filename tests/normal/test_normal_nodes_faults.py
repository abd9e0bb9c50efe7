"""Groups with nodes: ranks that are gone, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import programs
import pytest
import torch
from expect import check_received, random_tokens
from node_groups import NodePlace
from node_places import OpenPair
from ranks import Processes

from ep_runtime import ConfigError, PeerTimeout, ShapeError
from ep_runtime.normal import virtual_normal_ranks

BUDGET_S = 0.5


@pytest.mark.parametrize("what", ["exact", "worst", "cached", "combine"])
def test_an_absent_rank_is_named_by_all_others(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator, what: str
) -> None:
    """Also by those that share neither its node nor its rail."""
    pair, ranks = open_pair(), nodes.num_ranks
    group, experts = pair.layered, 4 * nodes.num_ranks
    absent = ranks - 1
    inputs = [random_tokens(rng, 8, 256, 4, experts) for _ in range(ranks)]
    options: dict[str, Any] = {"num_experts": experts}
    got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
    check_received(got, inputs, experts)
    group.run(programs.query, [("set_time_budget", BUDGET_S)] * ranks)
    calls: dict[str, tuple[Any, list[Any]]] = {
        "exact": (programs.dispatch_with, [(one, options) for one in inputs]),
        "worst": (
            programs.dispatch_with,
            [(one, options | {"num_worst_tokens": 8 * ranks}) for one in inputs],
        ),
        "cached": (programs.cached, [(one, "last") for one in inputs]),
        "combine": (
            programs.combine,
            [(torch.zeros(rows.x.shape).bfloat16(), None, []) for rows in got],
        ),
    }
    program, arguments = calls[what]
    started = time.monotonic()
    outcomes = group.outcomes(
        program, [None if rank == absent else arguments[rank] for rank in range(ranks)]
    )
    late = group.outcomes(settle, [None if rank == absent else () for rank in range(ranks)])
    assert time.monotonic() - started < 20 * BUDGET_S
    for rank in range(ranks - 1):
        told = [o for o in (outcomes[rank], late[rank]) if isinstance(o, BaseException)]
        assert told, f"rank {rank} was not told"
        assert isinstance(told[0], PeerTimeout), told[0]
        assert told[0].peer == absent, told[0]
    group.run(programs.query, [("reset",)] * ranks)
    got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
    check_received(got, inputs, experts)


def settle(buffer: Any) -> None:
    buffer._ops.synchronize()
    buffer.check()


def test_more_tokens_than_a_rail_keeps_are_refused(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    group, experts = open_pair(max_tokens=8).layered, 4 * nodes.num_ranks
    tokens = random_tokens(rng, 9, 256, 4, experts)
    for outcome in group.outcomes(
        programs.dispatch_with, [(tokens, {"num_experts": experts})] * nodes.num_ranks
    ):
        assert isinstance(outcome, ShapeError)
        assert "max_tokens=8" in str(outcome)
        assert "reserve" in str(outcome)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"ranks_per_node": 3}, "ranks_per_node=3"),
        ({"ranks_per_node": 0}, "ranks_per_node=0"),
        ({"ranks_per_node": 2, "between_nodes": "pigeon"}, "'pigeon'"),
        ({"between_nodes": "direct"}, "without ranks_per_node"),
        ({"ranks_per_node": 2, "max_tokens": 1 << 20}, "max_tokens=1048576"),
    ],
)
def test_nodes_that_cannot_be(given: dict[str, Any], value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        virtual_normal_ranks(4, backend="host", **{"max_tokens": 8, "max_hidden": 128, **given})
    assert value in str(caught.value)


def test_ranks_that_declare_different_nodes_are_told(normal_pools: dict[str, Processes]) -> None:
    name = "host-processes4-disagreeing"
    pool = normal_pools.setdefault(name, Processes(4, "host"))
    sizes = {"max_tokens": 8, "max_hidden": 128}
    answers = pool.ask(
        [("open", {**sizes, "ranks_per_node": 1 if r == 3 else 2}) for r in range(4)]
    )
    for answer in answers:
        assert isinstance(answer, ConfigError)
        assert "rank 3 has ranks_per_node=1 (not 2)" in str(answer)
