"""Who owns received rows, what happens when memory runs out, and how it grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import programs
import pytest
import torch
from expect import check_combined, check_received, random_group, random_results, random_tokens
from ranks import Group, Place, ThreadGroup

from ep_runtime import ShapeError
from ep_runtime.native import _C
from ep_runtime.normal import NormalBuffer
from ep_runtime.normal.config import block_bytes
from ep_runtime.normal.heap import DataHeap
from ep_runtime.normal.ops import NormalOps
from ep_runtime.normal.reference import RankTokens

OpenGroup = Callable[..., Group]
EXPERTS = 16
SIZES = {"max_tokens": 16, "max_hidden": 256, "max_experts": 64, "max_topk": 8}


def send(group: Group, rng: torch.Generator, most: int = 16, hidden: int = 256) -> None:
    """A dispatch and a combine that must work."""
    inputs = random_group(rng, group.num_ranks, hidden, 4, EXPERTS, most)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
    expected = check_received(got, inputs, EXPERTS)
    rows, weights = random_results(rng, expected, hidden, 4)
    back = group.run(programs.combine, [(y, w, []) for y, w in zip(rows, weights, strict=True)])
    check_combined([y for y, _ in back], rows, expected, [one.x.shape[0] for one in inputs])


def hold(buffer: NormalBuffer, tokens: RankTokens, name: str) -> torch.Tensor:
    """Dispatch, and keep nothing but x."""
    received = buffer.dispatch(
        programs.rows_of(buffer, tokens),
        tokens.topk_idx.to(buffer.device),
        tokens.topk_weights.to(buffer.device),
        num_experts=EXPERTS,
    )
    x = programs.keep(buffer, name, received.x)
    programs.finish(buffer)
    return x.cpu().clone()


def held(buffer: NormalBuffer, name: str) -> torch.Tensor:
    x: torch.Tensor = programs.kept(buffer, name)
    return x.cpu().clone()


def use_of(buffer: NormalBuffer) -> tuple[int, int, int]:
    return buffer.pool_in_use, buffer.stats.copied_dispatches, buffer.stats.growths


def test_memory_goes_back_with_the_last_tensor(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    group = open_group(**SIZES)
    for _ in range(20):  # more than the pool holds at once
        send(group, rng)
        group.run(programs.forget)
    assert all(use[1:] == (0, 0) for use in group.run(use_of))
    inputs = [random_tokens(rng, 8, 256, 4, EXPERTS, idle=0) for _ in range(place.num_ranks)]
    group.run(hold, [(one, "x") for one in inputs])
    in_use = group.run(programs.forget)
    assert in_use == [0] * place.num_ranks


def test_pool_exhaustion_copies_and_loses_nothing(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    one_block = block_bytes(ranks * 16, 512, 0, 4)
    group = open_group(**SIZES, pool_bytes=2 * one_block)
    inputs = [[random_tokens(rng, 16, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]]
    inputs += [random_group(rng, ranks, 256, 4, EXPERTS, 16) for _ in range(7)]
    for one in inputs[0]:  # every token to every rank: the largest blocks there are
        one.topk_idx[:, 0] = torch.arange(16) % EXPERTS
        one.topk_idx[:, 1:] = -1
    first = [
        group.run(hold, [(one, f"x{turn}") for one in tokens]) for turn, tokens in enumerate(inputs)
    ]
    for _ in range(3):
        send(group, rng)
    for turn, copies in enumerate(first):  # nothing that is alive was overwritten
        for before, now in zip(copies, group.run(held, [(f"x{turn}",)] * ranks), strict=True):
            assert torch.equal(before.view(torch.uint8), now.view(torch.uint8))
    group.run(programs.forget)
    send(group, rng)


def keep_on_rank_0(buffer: NormalBuffer, name: str) -> None:
    if buffer.rank:
        programs.drop(buffer, name)


def test_exact_dispatches_hold_what_came_and_no_more(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """They are sent before anybody knows how much comes, where there is room for the most."""
    ranks = place.num_ranks
    group = open_group(**SIZES)
    inputs = [random_tokens(rng, 3, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]
    rows = [x.shape[0] for x in group.run(hold, [(one, "x") for one in inputs])]
    for (in_use, copied, _), came in zip(group.run(use_of), rows, strict=True):
        assert in_use == 512 * came
        assert copied == 0


def test_a_rank_without_room_waits_for_counts_while_others_send_ahead(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    most = block_bytes(ranks * 16, 512, 0, 4)
    group = open_group(**SIZES, pool_bytes=most)
    inputs = [random_tokens(rng, 2, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]
    group.run(hold, [(one, "x") for one in inputs])
    group.run(keep_on_rank_0, [("x",)] * ranks)
    for _ in range(4):
        send(group, rng)
        group.run(programs.drop, [("last",)] * ranks)
    assert [use[1] for use in group.run(use_of)][1:] == [0] * (ranks - 1)
    group.run(programs.forget)
    large = [random_tokens(rng, 100, 256, 4, EXPERTS, idle=0) for _ in range(ranks)]
    got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in large])
    check_received(got, large, EXPERTS)  # more than anybody has room for: sent once more


def test_what_never_came_before_is_sent_twice_and_then_once(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the kernels find too little room for it, on all ranks; then all know to have more."""
    sent: list[int] = []
    dispatch = NormalOps.dispatch

    def count(ops: NormalOps, *given: Any) -> None:
        sent.append(given[6])  # BLOCK_AHEAD or BLOCK_EXACT
        dispatch(ops, *given)

    monkeypatch.setattr(NormalOps, "dispatch", count)
    group = ThreadGroup(2, "host", None, **SIZES)
    large = [random_tokens(rng, 100, 256, 4, EXPERTS, idle=0) for _ in range(2)]
    for turn in range(3):
        sent.clear()
        if turn == 2:
            group.run(reset)
        got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in large])
        check_received(got, large, EXPERTS)
        again = [] if turn == 1 else [_C.BLOCK_EXACT] * 2
        assert sorted(sent) == sorted([*again, *[_C.BLOCK_AHEAD] * 2])
        del got
        group.run(programs.forget)
    group.close()


def reset(buffer: NormalBuffer) -> None:
    buffer.reset()


def test_no_pool_at_all(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    group = open_group(**SIZES, pool_bytes=0)
    for _ in range(3):
        send(group, rng)
    assert all(use == (0, 3, 0) for use in group.run(use_of))


def test_exact_mode_grows_with_tokens_and_channels(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    group = open_group(**SIZES)
    inputs = [random_tokens(rng, 5, 256, 4, EXPERTS) for _ in range(ranks)]
    before = group.run(hold, [(one, "old") for one in inputs])
    large = [random_tokens(rng, 700 if r == 0 else 3, 256, 4, EXPERTS) for r in range(ranks)]
    for turn in range(2):
        got = group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in large])
        expected = check_received(got, large, EXPERTS)
        rows, weights = random_results(rng, expected, 256, 4)
        back = group.run(programs.combine, [(y, w, []) for y, w in zip(rows, weights, strict=True)])
        check_combined([y for y, _ in back], rows, expected, [one.x.shape[0] for one in large])
        growths = {use[2] for use in group.run(use_of)}
        if turn == 0:
            most = growths
            assert len(growths) == 1
            assert growths.pop() >= 1
        else:
            assert growths == most or most == set()
    send(group, rng, hidden=4096)  # wider rows than it was built for
    for rank, x in enumerate(group.run(held, [("old",)] * ranks)):
        assert torch.equal(x, before[rank]), "a tensor of the old heap changed"
    group.run(programs.forget)
    send(group, rng)


def test_virtual_ranks_free_a_replaced_heap_only_where_they_meet(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing waits for the device, on which a peer's kernel may wait for this rank's next one."""
    freed: list[DataHeap] = []
    free = DataHeap.free
    monkeypatch.setattr(DataHeap, "free", lambda heap: (freed.append(heap), free(heap)))
    group = ThreadGroup(2, "host", None, **SIZES)
    group.run(hold, [(random_tokens(rng, 5, 256, 4, EXPERTS), "old")] * 2)
    old = [buffer._heap for buffer in group.buffers]
    group.run(reserve, [(10_000,)] * 2)
    assert freed == []  # a tensor lies in each
    group.run(programs.forget)
    send(group, rng)
    assert freed == []
    group.run(reserve, [(30_000,)] * 2)
    assert {use[2] for use in group.run(use_of)} == {2}
    assert {id(heap) for heap in old} <= {id(heap) for heap in freed}
    send(group, rng)
    group.close()


def test_reserve_makes_room_for_worst_case_dispatches(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    ranks = place.num_ranks
    group = open_group(**SIZES)
    inputs = [random_tokens(rng, 60, 256, 4, EXPERTS) for _ in range(ranks)]
    options = {"num_experts": EXPERTS, "num_worst_tokens": 64 * ranks}
    for answer in group.outcomes(programs.dispatch_with, [(one, options) for one in inputs]):
        assert isinstance(answer, ShapeError), answer
        assert "max_tokens=16" in str(answer)
        assert "reserve" in str(answer)
    group.run(reserve, [(64,)] * ranks)
    group.run(programs.poison)
    got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
    check_received(got, inputs, EXPERTS, worst=64 * ranks)


def reserve(buffer: NormalBuffer, max_tokens: int) -> None:
    buffer.reserve(max_tokens=max_tokens)


def test_two_buffers_of_the_same_ranks_do_not_meet(place: Place, rng: torch.Generator) -> None:
    if place.kind != "threads":
        pytest.skip("a test process holds one buffer; virtual ranks show the same")
    groups = [ThreadGroup(place.num_ranks, place.backend, place.devices, **SIZES) for _ in range(2)]
    inputs = [random_group(rng, place.num_ranks, 256, 4, EXPERTS, 16) for _ in groups]
    got = [
        group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in tokens])
        for group, tokens in zip(groups, inputs, strict=True)
    ]
    for group, rows, tokens in reversed(list(zip(groups, got, inputs, strict=True))):
        expected = check_received(rows, tokens, EXPERTS)
        sent, weights = random_results(rng, expected, 256, 4)
        back = group.run(programs.combine, [(y, w, []) for y, w in zip(sent, weights, strict=True)])
        check_combined([y for y, _ in back], sent, expected, [one.x.shape[0] for one in tokens])
    for group in groups:
        group.close()


def test_received_tensors_outlive_the_buffer(place: Place, rng: torch.Generator) -> None:
    if place.kind != "threads":
        pytest.skip("the tensors of a test process die with its buffer")
    group = ThreadGroup(place.num_ranks, place.backend, place.devices, **SIZES)
    inputs = [random_tokens(rng, 9, 256, 4, EXPERTS) for _ in range(place.num_ranks)]
    before = group.run(hold, [(one, "x") for one in inputs])
    tensors = [programs.kept(buffer, "x") for buffer in group.buffers]
    group.close()
    for tensor, right in zip(tensors, before, strict=True):
        assert torch.equal(tensor.cpu(), right)
    for buffer in group.buffers:
        programs.drop(buffer, "x")
