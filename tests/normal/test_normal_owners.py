"""Rows go back to the pool by themselves, and what is copied has memory of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable

import programs
import pytest
import torch
from expect import check_received, random_tokens
from node_groups import NodePlace
from node_places import OpenPair
from ranks import Group, Place, ThreadGroup

from ep_runtime.normal import NormalBuffer, NormalReceived
from ep_runtime.normal.config import block_bytes
from ep_runtime.normal.heap import DataHeap, _Owner
from ep_runtime.normal.reference import RankTokens

OpenGroup = Callable[..., Group]
EXPERTS, HIDDEN, TOPK, MOST = 48, 256, 4, 16
ROW = 2 * HIDDEN
SIZES = {"max_tokens": MOST, "max_hidden": HIDDEN, "max_experts": 64, "max_topk": TOPK}
BESIDE = ("topk_idx", "topk_weights", "source_token")
MODES = ["exact", "worst", "cached"]


def receive(buffer: NormalBuffer, tokens: RankTokens, mode: str) -> NormalReceived:
    """A dispatch in one of the three modes."""
    x = programs.rows_of(buffer, tokens)
    idx, weights = tokens.topk_idx.to(buffer.device), tokens.topk_weights.to(buffer.device)
    worst = buffer.num_ranks * MOST if mode == "worst" else 0
    received = buffer.dispatch(x, idx, weights, num_experts=EXPERTS, num_worst_tokens=worst)
    if mode != "cached":
        return received
    handle = received.handle
    del received
    return buffer.dispatch_cached(x, handle, topk_weights=weights)


def keep_only(buffer: NormalBuffer, tokens: RankTokens, mode: str, names: tuple[str, ...]) -> int:
    """Dispatch, and keep only these tensors; how many rows came."""
    received = receive(buffer, tokens, mode)
    for name in names:
        programs.keep(buffer, name, getattr(received, name))
    programs.finish(buffer)
    return received.handle.num_rows


def in_use_without(buffer: NormalBuffer, *names: str) -> int:
    """Bytes of the pool in use when these tensors are dropped."""
    for name in names:
        programs.drop(buffer, name)
    return buffer.pool_in_use


def drawn(rng: torch.Generator, ranks: int, scales: str | None = None) -> list[RankTokens]:
    return [
        random_tokens(rng, 5, HIDDEN, TOPK, EXPERTS, scales=scales, idle=0) for _ in range(ranks)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_rows_go_back_while_routes_are_held(
    open_group: OpenGroup, place: Place, rng: torch.Generator, mode: str
) -> None:
    ranks = place.num_ranks
    group = open_group(**SIZES)
    names = ("x", *BESIDE)
    rows = group.run(keep_only, [(one, mode, names) for one in drawn(rng, ranks)])
    # Before an exact dispatch knows how many rows come, it takes room for the most.
    room = [ranks * MOST] * ranks if mode == "exact" else rows
    beside = [max(block_bytes(n, 0, 0, TOPK), 128) for n in room]
    whole = [its + ROW * n for its, n in zip(beside, rows, strict=True)]
    assert group.run(in_use_without) == whole
    assert group.run(in_use_without, [("x",)] * ranks) == beside
    assert group.run(in_use_without, [BESIDE[:2]] * ranks) == beside
    assert group.run(in_use_without, [BESIDE] * ranks) == [0] * ranks


@pytest.mark.parametrize("mode", MODES)
def test_routes_go_back_while_rows_are_held(
    open_group: OpenGroup, place: Place, rng: torch.Generator, mode: str
) -> None:
    ranks = place.num_ranks
    group = open_group(**SIZES)
    rows = group.run(keep_only, [(one, mode, ("x",)) for one in drawn(rng, ranks)])
    assert group.run(in_use_without) == [ROW * n for n in rows]
    assert group.run(in_use_without, [("x",)] * ranks) == [0] * ranks


def hold_routes(buffer: NormalBuffer, layers: list[RankTokens], mode: str) -> tuple[int, bool]:
    """(dispatches copied, nothing held has changed) when only routes are kept of each layer."""
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tokens in layers:
        received = receive(buffer, tokens, mode)
        programs.finish(buffer)
        held += [
            (mine, mine.cpu().clone()) for mine in (received.source_token, received.topk_weights)
        ]
        del received
    same = all(torch.equal(mine.cpu(), before) for mine, before in held)
    return buffer.stats.copied_dispatches, same


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_pool_serve_every_layer_whose_routes_are_held(
    open_group: OpenGroup, place: Place, rng: torch.Generator, mode: str
) -> None:
    """As training keeps them until the backward pass: 12 layers in room for the rows of one."""
    ranks, layers = place.num_ranks, 12
    beside = block_bytes(ranks * MOST, 0, 0, TOPK)
    group = open_group(**SIZES, pool_bytes=ranks * MOST * ROW + layers * beside)
    tokens = [drawn(rng, layers) for _ in range(ranks)]
    got = group.run(hold_routes, [(mine, mode) for mine in tokens])
    assert got == [(0, True)] * ranks
    assert group.run(programs.forget) == [0] * ranks


def cut_apart(buffer: NormalBuffer, tokens: RankTokens, mode: str) -> programs.Rows:
    """What a dispatch without a pool gives, once the rows' memory was given up and taken again."""
    received = receive(buffer, tokens, mode)
    programs.finish(buffer)
    made = [getattr(received, name) for name in ("x", "scales", *BESIDE)]
    tensors = [one for one in made if one is not None]
    storages = [one.untyped_storage() for one in tensors]
    assert [storage.nbytes() for storage in storages] == [one.nbytes for one in tensors]
    rows, memory = received.x.cpu().clone(), received.x.untyped_storage()
    memory.resize_(0)
    memory.resize_(rows.nbytes)
    received.x.copy_(rows)
    return programs.snapshot(buffer, programs.keep(buffer, "last", received))


def rows_that_came(buffer: NormalBuffer) -> int:
    return int(programs.kept(buffer, "last").handle.rank_prefix[-1, buffer.rank])


def check_cut_apart(group: Group, inputs: list[RankTokens], mode: str) -> None:
    got = group.run(cut_apart, [(one, mode) for one in inputs])
    worst = group.num_ranks * MOST if mode == "worst" else 0
    for mine, rows in zip(got, group.run(rows_that_came), strict=True):
        mine.x[rows:].view(torch.uint8).fill_(programs.POISON)  # nothing is promised of it
    check_received(got, inputs, EXPERTS, worst=worst, topk=mode != "cached")
    stats = group.run(programs.query, [("stats",)] * group.num_ranks)
    assert all(one.copied_dispatches == one.dispatches > 0 for one in stats)
    assert group.run(in_use_without) == [0] * group.num_ranks


@pytest.mark.parametrize("scales", [None, "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_copied_tensors_have_memory_of_their_own(
    open_group: OpenGroup, place: Place, rng: torch.Generator, mode: str, scales: str | None
) -> None:
    group = open_group(**SIZES, pool_bytes=0)
    check_cut_apart(group, drawn(rng, place.num_ranks, scales), mode)


@pytest.mark.parametrize("mode", MODES)
def test_copied_tensors_of_nodes_have_memory_of_their_own(
    open_pair: OpenPair, nodes: NodePlace, rng: torch.Generator, mode: str
) -> None:
    group = open_pair(**SIZES, pool_bytes=0).layered
    check_cut_apart(group, drawn(rng, nodes.num_ranks), mode)


@pytest.mark.parametrize(("pool_bytes", "told"), [(0, 0), (1024, 1)])
def test_copying_is_told_once_and_only_where_there_is_a_pool(
    rng: torch.Generator, caplog: pytest.LogCaptureFixture, pool_bytes: int, told: int
) -> None:
    group = ThreadGroup(1, "host", None, **SIZES, pool_bytes=pool_bytes)
    with caplog.at_level(logging.INFO, "ep_runtime"):
        for _ in range(2):
            group.run(keep_only, [(one, "exact", ()) for one in drawn(rng, 1)])
    group.close()
    assert sum("raise pool_bytes" in one.getMessage() for one in caplog.records) == told


def test_a_replaced_heap_lives_until_both_parts_are_dropped(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[DataHeap] = []
    free = DataHeap.free
    monkeypatch.setattr(DataHeap, "free", lambda heap: (freed.append(heap), free(heap)))
    group = ThreadGroup(1, "host", None, **SIZES)
    group.run(keep_only, [(one, "exact", ("x", "source_token")) for one in drawn(rng, 1)])
    tokens = programs.kept(group.buffers[0], "source_token")
    before = tokens.clone()
    for thread in group.threads:
        thread.shutdown()
    buffer = group.buffers[0]
    buffer.close()
    programs.drop(buffer, "x")
    assert freed == []
    assert torch.equal(tokens, before)
    del tokens
    programs.drop(buffer, "source_token")
    assert len(freed) == 1


def test_an_owner_that_was_not_made_gives_nothing_back() -> None:
    """Python deletes it as well, and prints what that raises."""
    _Owner.__new__(_Owner).__del__()
