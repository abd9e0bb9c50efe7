"""Groups whose ranks are declared nodes: the same rows as a flat group, each across once per node.

Every test runs on a group whose rows go over rails and nodes and on a flat group of the same nodes,
which must give the same bits, and holds them against a reference that knows of neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import node_groups
import programs
import pytest
import torch
from expect import (
    below,
    bits,
    check_received,
    random_experts,
    random_group,
    random_results,
    random_tokens,
)
from node_groups import NodePlace, Pair, check_near, goes_to_node, sum_by_nodes
from node_places import MOST, OpenPair
from ranks import ThreadGroup
from test_normal_autograd import bring, layer

from ep_runtime import ShapeError
from ep_runtime.normal.reference import ExpectedRows, RankTokens


def combine_and_check(
    pair: Pair,
    rng: torch.Generator,
    inputs: Sequence[RankTokens],
    expected: Sequence[ExpectedRows],
    nodes: NodePlace,
    *,
    hidden: int,
    topk: int,
    worst: int = 0,
    biases: int = 0,
    extra: int = 0,
) -> None:
    rows, weights = random_results(rng, expected, hidden, topk, worst)
    tokens = [one.x.shape[0] for one in inputs]
    bias = [
        [torch.randn((t, hidden), generator=rng).bfloat16() for _ in range(biases)] for t in tokens
    ]
    got = pair.both(
        programs.combine,
        [(y, w, b, "last", extra) for y, w, b in zip(rows, weights, bias, strict=True)],
    )
    per_node = nodes.ranks_per_node
    for which, given, added in ((0, rows, bias), (1, weights, None)):
        right = sum_by_nodes(given, expected, tokens, per_node, added)
        for rank, one in enumerate(got):
            assert torch.equal(one[which], right[rank]), f"rank {rank}: order of additions"
        check_near([one[which] for one in got], given, expected, tokens, added)


@pytest.mark.parametrize("scales", [None, "float32", "int32", "flat"])
def test_pairs_match_the_reference_and_the_flat_group(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator, scales: str | None
) -> None:
    pair = open_pair()
    for turn in range(4):
        hidden, topk = (256, 272, 1024, 880)[below(rng, 4)], (1, 2, 8, 4)[turn]
        worst = (0, nodes.num_ranks * MOST + 3)[turn % 2]
        experts = random_experts(rng, nodes.num_ranks, topk)
        inputs = random_group(rng, nodes.num_ranks, hidden, topk, experts, MOST, scales=scales)
        options = {"num_experts": experts, "expert_alignment": 4, "num_worst_tokens": worst}
        for group in (pair.layered, pair.flat):
            group.run(programs.forget)
            group.run(programs.poison)
        got = pair.both(programs.dispatch_with, [(one, options, 16 * turn) for one in inputs])
        expected = check_received(got, inputs, experts, alignment=4, worst=worst)
        pair.both(node_groups.handle_tables)
        combine_and_check(
            pair,
            rng,
            inputs,
            expected,
            nodes,
            hidden=hidden,
            topk=topk,
            worst=worst,
            biases=turn % 3,
            extra=8 * turn,
        )


def test_cached_handles_carry_other_rows_and_whole_weights(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair, ranks = open_pair(), nodes.num_ranks
    experts = random_experts(rng, ranks, 4)
    first = random_group(rng, ranks, 512, 4, experts, MOST)
    options = {"num_experts": experts}
    got = pair.both(programs.dispatch_with, [(one, options) for one in first])
    expected = check_received(got, first, experts)
    pair.both(programs.rename, [("first",)] * ranks)
    for turn in range(3):
        other = random_group(rng, ranks, 256, 2, experts, MOST, scales="float32")
        pair.both(programs.dispatch_with, [(one, options) for one in other])
        pair.layered.run(programs.poison_pool)
        sent = [
            RankTokens(new.x, old.topk_idx, new.topk_weights, new.scales)
            for old in first
            for new in [
                random_tokens(
                    rng, old.x.shape[0], 384, 4, experts, scales="float32" if turn == 1 else None
                )
            ]
        ]
        got = pair.both(programs.cached, [(one, "first", turn > 0) for one in sent])
        check_received(got, sent, experts, topk=False)
        for mine, right in zip(got, expected, strict=True):
            if turn == 0:
                assert mine.topk_weights is None
                continue
            for row, (sender, token) in enumerate(right.source):
                assert torch.equal(mine.topk_weights[row], sent[sender].topk_weights[token])


def test_all_tokens_go_to_one_node_or_stay_or_there_are_none(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair, ranks = open_pair(), nodes.num_ranks
    experts = 4 * ranks
    per_node = experts // nodes.num_nodes
    for kind in ("last node", "own node", "nobody has tokens", "one rank has tokens"):
        inputs = [random_tokens(rng, MOST, 256, 4, experts) for _ in range(ranks)]
        for rank, one in enumerate(inputs):
            node = rank // nodes.ranks_per_node if kind == "own node" else nodes.num_nodes - 1
            if kind in ("last node", "own node"):
                one.topk_idx[:] = one.topk_idx % per_node + node * per_node
        if kind == "nobody has tokens":
            inputs = [random_tokens(rng, 0, 256, 4, experts) for _ in range(ranks)]
        if kind == "one rank has tokens":
            inputs[1:] = [random_tokens(rng, 0, 256, 4, experts) for _ in inputs[1:]]
        got = pair.both(programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs])
        expected = check_received(got, inputs, experts)
        combine_and_check(pair, rng, inputs, expected, nodes, hidden=256, topk=4)


def test_each_token_crosses_once_per_node(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair, ranks = open_pair(), nodes.num_ranks
    experts = 4 * ranks
    for rows, scales in ((MOST, None), (7, "float32")):
        inputs = [random_tokens(rng, rows, 256, 8, experts, scales=scales) for _ in range(ranks)]
        pair.layered.run(programs.poison)
        pair.layered.run(
            programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs]
        )
        row_bytes = inputs[0].x.element_size() * 256
        groups = 0 if inputs[0].scales is None else inputs[0].scales.shape[1]
        came = pair.layered.run(node_groups.crossed, [("last", row_bytes, groups, 8)] * ranks)
        goes = goes_to_node(inputs, experts, nodes.num_nodes)
        for rank, (counted, block) in enumerate(came):
            node, local = divmod(rank, nodes.ranks_per_node)
            # A row for each token of the rail that the node wants: by node, then token.
            wanted = [
                bits(inputs[source].x[token : token + 1]).flatten()
                for source in range(local, ranks, nodes.ranks_per_node)
                for token in range(rows)
                if goes[source][token, node]
            ]
            assert counted == len(wanted), f"rank {rank}"
            assert torch.equal(block, torch.stack(wanted)), f"rank {rank}"


def test_rows_alone_along_a_layout(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair = open_pair()
    experts = random_experts(rng, nodes.num_ranks, 4)
    inputs = random_group(rng, nodes.num_ranks, 256, 4, experts, MOST)
    for with_topk in (True, False):
        got = pair.both(
            programs.layout_then_dispatch, [(one, experts, with_topk) for one in inputs]
        )
        check_received([rows for _, rows in got], inputs, experts, topk=with_topk)


def test_wider_rows_and_more_tokens_make_room(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair, ranks = open_pair(max_tokens=8, max_hidden=128), nodes.num_ranks
    experts = 4 * ranks
    if nodes.between == "puts":
        regions_do_not_grow(pair, nodes, rng)
        return
    for most, hidden in ((8, 1024), (24, 512)):
        if most > 8:
            for group in (pair.layered, pair.flat):
                group.run(reserve, [(most,)] * ranks)
        inputs = random_group(rng, ranks, hidden, 4, experts, most)
        options = {"num_experts": experts, "num_worst_tokens": ranks * most}
        for group in (pair.layered, pair.flat):  # rows that nobody sent differ
            group.run(programs.dispatch_with, [(one, options) for one in inputs])
        got = pair.both(programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs])
        right = check_received(got, inputs, experts)
        combine_and_check(pair, rng, inputs, right, nodes, hidden=hidden, topk=4)


def regions_do_not_grow(pair: Pair, nodes: NodePlace, rng: torch.Generator) -> None:
    ranks, experts = nodes.num_ranks, 4 * nodes.num_ranks
    wide = [random_tokens(rng, 4, 1024, 4, experts) for _ in range(ranks)]
    fit = [random_tokens(rng, 4, 128, 4, experts) for _ in range(ranks)]
    options = {"num_experts": experts}
    got = pair.both(programs.dispatch_with, [(one, options) for one in fit])
    results = [(torch.zeros(one.x.shape[0], 136).bfloat16(), None, []) for one in got]
    for program, arguments in (
        (programs.dispatch_with, [(one, options) for one in wide]),
        (programs.combine, results),
        (reserve, [(16,)] * ranks),
    ):
        for outcome in pair.layered.outcomes(program, arguments):
            assert isinstance(outcome, ShapeError), outcome
            assert "cannot grow" in str(outcome)
            assert "build the NormalBuffer" in str(outcome)
    # Nothing was launched, and the group works on.
    got = pair.both(programs.dispatch_with, [(one, options) for one in fit])
    check_received(got, fit, experts)


def reserve(buffer: Any, most: int) -> None:
    buffer.reserve(max_tokens=most)


def test_gradients_are_those_of_the_flat_group(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator
) -> None:
    pair, ranks = open_pair(), nodes.num_ranks
    experts = 4 * ranks
    gains = torch.randn((experts, 256), generator=rng)
    for worst in (0, ranks * MOST):
        inputs = random_group(rng, ranks, 256, 4, experts, MOST)
        arguments = [
            (
                one,
                gains,
                torch.randn(one.x.shape, generator=rng).bfloat16(),
                (
                    torch.randn(one.x.shape, generator=rng),
                    torch.randn(one.topk_weights.shape, generator=rng),
                ),
            )
            for one in inputs
        ]
        pair.both(bring, arguments)
        pair.both(layer, [(True, worst)] * ranks)


def test_one_node_is_a_flat_group(rng: torch.Generator) -> None:
    sizes = {"max_tokens": MOST, "max_hidden": 256, "max_experts": 64}
    alone = ThreadGroup(4, "host", None, **sizes)
    declared = ThreadGroup(4, "host", None, **sizes, ranks_per_node=4)
    assert declared.run(node_groups.num_parts) == [0] * 4
    inputs = random_group(rng, 4, 256, 4, 16, MOST)
    pair = Pair(declared, alone)
    got = pair.both(programs.dispatch_with, [(one, {"num_experts": 16}) for one in inputs])
    rows, weights = random_results(rng, check_received(got, inputs, 16), 256, 4)
    pair.both(programs.combine, [(y, w, []) for y, w in zip(rows, weights, strict=True)])
    alone.close()
    declared.close()
