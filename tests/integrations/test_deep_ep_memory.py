"""Memory of what normal calls return: who keeps which part of it, and whose storage it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from normal_cases import Flow, Sent, check_received, check_rows, combine, dispatch, wanted_here
from traffic import Sizes, Tokens, draw

from ep_runtime import env
from ep_runtime.errors import ConfigError
from ep_runtime.integrations.deep_ep import Buffer
from ep_runtime.normal import NormalBuffer

SIZES = Sizes(num_experts=8, topk=3, hidden=512, max_tokens=60)
ROWS_OF_ONE = 4 * SIZES.max_tokens * 2 * SIZES.hidden  # bytes that at most four ranks can send
LAYERS = 8
FLOWS = pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
OWN = {"EP_OWN_TENSORS": "1"}


def open_buffer(rank: Rank, num_nvl_bytes: int) -> Buffer:
    return Buffer(rank.group, num_nvl_bytes, 0, explicitly_destroy=True)


def behind(buffer: Buffer) -> NormalBuffer:
    made = buffer._normal._buffer
    assert made is not None
    return made


def full(seed: int, rank: Rank) -> list[Tokens]:
    return draw(seed, SIZES, rank.num_ranks, full=True)


def layers(rank: Rank, seed: int, asynchronous: bool) -> None:
    """Forward through layers that keep handles, choices and weights; backward from the last."""
    buffer, flow = open_buffer(rank, 2 * ROWS_OF_ONE), Flow(asynchronous)
    kept: list[Sent] = []
    for layer in range(LAYERS):
        sent = dispatch(rank, buffer, full(seed + layer, rank), SIZES, flow)
        check_received(rank, sent)
        kept.append(sent)
        sent.received = sent.received.clone()  # the rows of the Buffer are dropped
    normal = behind(buffer)
    assert normal.stats.copied_dispatches == 0
    in_use = [normal.pool_in_use]
    assert 0 < in_use[0] < ROWS_OF_ONE // 2
    while kept:
        sent = kept.pop()
        check_received(rank, sent)  # also recv_src_idx, behind the traffic of all layers
        combine(rank, buffer, sent, flow)
        del sent
        in_use.append(normal.pool_in_use)
    assert in_use == sorted(in_use, reverse=True)
    assert in_use[-1] == 0
    buffer.destroy()


@FLOWS
def test_kept_handles_keep_no_rows(pool: RankPool, seed: int, asynchronous: bool) -> None:
    pool.run(layers, seed, asynchronous)


def tensors_of(sent: Sent) -> list[torch.Tensor]:
    rows = sent.received if isinstance(sent.received, tuple) else (sent.received,)
    beside = (sent.topk_idx, sent.weights, sent.handle[3])
    return [one for one in (*rows, *beside) if one is not None]


def give_up_rows(rank: Rank, sent: Sent) -> None:
    """As schedules do that overlap layers: the rows' storage is emptied, and filled later."""
    rank.settle()
    for one in tensors_of(sent):
        assert one.untyped_storage().nbytes() == one.nbytes
    x = tensors_of(sent)[0]
    saved, storage = x.clone(), x.untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0
    storage.resize_(saved.nbytes)
    x.copy_(saved)


def without_room(rank: Rank, seed: int) -> None:
    buffer, flow = open_buffer(rank, 1024), Flow(False)
    sent = dispatch(rank, buffer, full(seed, rank), SIZES, flow)
    assert behind(buffer).stats.copied_dispatches == 1
    give_up_rows(rank, sent)
    check_received(rank, sent)
    combine(rank, buffer, sent, flow)
    buffer.destroy()


def test_copied_rows_can_be_given_up_alone(pool: RankPool, seed: int) -> None:
    pool.run(without_room, seed)


def owned(rank: Rank, seed: int, asynchronous: bool) -> None:
    """Every kind of dispatch gives tensors of their own, whatever room num_nvl_bytes has."""
    with env.defaults(OWN):
        buffer = open_buffer(rank, 8 * ROWS_OF_ONE)
    flow, worst = Flow(asynchronous), rank.num_ranks * SIZES.max_tokens
    kinds: list[dict[str, Any]] = [{}, {"fp8": True}, {"num_worst_tokens": worst}]
    for turn, options in enumerate(kinds):
        sent = dispatch(rank, buffer, full(seed + turn, rank), SIZES, flow, **options)
        give_up_rows(rank, sent)
        check_received(rank, sent, worst=options.get("num_worst_tokens", 0))
        if not isinstance(sent.received, tuple):
            combine(rank, buffer, sent, flow)
    sent = dispatch(rank, buffer, full(seed + 3, rank), SIZES, flow)
    again, *_, event = buffer.dispatch(sent.x, handle=sent.handle, **flow.arguments())
    flow.done(event)
    flow.settle()
    sent.received = again
    give_up_rows(rank, sent)
    check_rows(sent, wanted_here(rank, sent), again)
    normal = behind(buffer)
    assert normal.heap_sizes.pool == 0
    assert normal.stats.copied_dispatches == normal.stats.dispatches
    buffer.destroy()


@FLOWS
def test_own_tensors_can_be_resized(pool: RankPool, seed: int, asynchronous: bool) -> None:
    pool.run(owned, seed, asynchronous)


def owned_between_nodes(rank: Rank, seed: int) -> None:
    with env.defaults(OWN):
        buffer = open_buffer(rank, 8 * ROWS_OF_ONE)
    own = full(seed, rank)[rank.rank]
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.topk_idx, 8)
    x, idx, weights, _, handle, _ = buffer.dispatch(
        own.x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=own.topk_idx,
        topk_weights=own.weights,
    )
    assert isinstance(x, torch.Tensor)
    saved = x.clone()
    for one in (x, idx, weights, handle[7]):
        assert one.untyped_storage().nbytes() == one.nbytes
    x.untyped_storage().resize_(0)
    out, _, _ = buffer.combine(saved, handle)
    visits = in_rank.view(-1, rank.num_ranks // 2, 2).sum(2)
    wanted = own.x.double() * visits.sum(1, keepdim=True)
    assert (out.double() - wanted).abs().max() <= 2.0**-7 * wanted.abs().max()
    buffer.destroy()


@pytest.fixture(scope="module")
def nodes() -> Iterator[RankPool]:
    pool = RankPool(4, False, {"EP_WARMUP_TIMEOUT_S": "30", "EP_RANKS_PER_NODE": "2"})
    yield pool
    pool.stop()


def test_own_tensors_between_nodes(nodes: RankPool, seed: int) -> None:
    nodes.run(owned_between_nodes, seed)


def disagreeing(rank: Rank, seed: int) -> None:
    with env.defaults(OWN if rank.rank == 0 else {}):
        buffer = open_buffer(rank, 1024)
    with pytest.raises(ConfigError, match="EP_OWN_TENSORS differs"):
        dispatch(rank, buffer, full(seed, rank), SIZES, Flow(False))
    buffer.destroy()


def test_ranks_must_agree_on_own_tensors(pair: RankPool, seed: int) -> None:
    pair.run(disagreeing, seed)


def local_memory(rank: Rank) -> None:
    buffer = open_buffer(rank, 1024)
    with torch.inference_mode():
        first = buffer.get_local_buffer_tensor(torch.float32)
        sized = buffer.get_local_buffer_tensor(torch.float32, torch.Size((2, 4)))
    for one in (first, sized, buffer.get_local_buffer_tensor(torch.float32)):
        one.fill_(rank.rank + 1)
        assert not one.is_inference()
    buffer.destroy()


def test_local_memory_made_in_inference_mode_takes_writes_outside(pool: RankPool) -> None:
    pool.run(local_memory)
