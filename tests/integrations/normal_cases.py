"""Normal calls as a rank makes them, checked by what DeepEP promises of each result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deep_ep_ranks import Rank
from traffic import Sizes, Tokens, calc_diff, draw, going_to, quantise

from ep_runtime.integrations.deep_ep import Buffer, EventOverlap

LIMIT = 5e-6  # 1 - 2<x,y> / (<x,x> + <y,y>) of a BF16 round trip


def open_buffer(rank: Rank, hidden: int) -> Buffer:
    """As DeepEP's users build one for normal calls."""
    nvl = rdma = 0
    for config in (
        Buffer.get_dispatch_config(rank.num_ranks),
        Buffer.get_combine_config(rank.num_ranks),
    ):
        nvl = max(nvl, config.get_nvl_buffer_size_hint(2 * hidden, rank.num_ranks))
        rdma = max(rdma, config.get_rdma_buffer_size_hint(2 * hidden, rank.num_ranks))
    # The hint is for thousands of tokens; the tests' few should make the pool run out, too.
    return Buffer(rank.group, min(nvl, 1 << 18), rdma, explicitly_destroy=True)


@dataclass
class Flow:
    """How calls are chained: plain, or asynchronous behind one another."""

    asynchronous: bool
    last: EventOverlap | None = None

    def arguments(self) -> dict[str, Any]:
        if not self.asynchronous:
            return {}
        return {
            "previous_event": self.last,
            "async_finish": True,
            "allocate_on_comm_stream": self.last is not None,
        }

    def done(self, event: EventOverlap) -> None:
        assert (event.event is not None) == self.asynchronous
        self.last = event if self.asynchronous else None

    def settle(self) -> None:
        """Let the current stream use the results; the next call follows the current stream."""
        if self.last is not None:
            self.last.current_stream_wait()
        self.last = Buffer.capture() if self.asynchronous else None


@dataclass
class Sent:
    everyone: list[Tokens]
    own: Tokens
    sizes: Sizes
    x: Any
    layout: tuple[torch.Tensor, ...]
    received: Any
    topk_idx: torch.Tensor | None
    weights: torch.Tensor | None
    counts: list[int] | None
    handle: Any


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, float32 scales stored by columns), as quantisers for DeepEP leave them."""
    values, scales = quantise(x.cpu(), False)
    by_column = scales.float().t().contiguous().t().to(x.device)
    return values.to(x.device), by_column


def dispatch(
    rank: Rank,
    buffer: Buffer,
    everyone: list[Tokens],
    sizes: Sizes,
    flow: Flow,
    *,
    fp8: bool = False,
    routes: bool = True,
    **options: Any,
) -> Sent:
    own = everyone[rank.rank].on(rank.device)
    per_rank, per_rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(
        own.topk_idx, sizes.num_experts, **flow.arguments()
    )
    assert per_rdma is None
    flow.done(event)
    x = fp8_rows(own.x) if fp8 else own.x
    received, idx, weights, counts, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=own.topk_idx if routes else None,
        topk_weights=own.weights if routes else None,
        **options,
        **flow.arguments(),
    )
    flow.done(event)
    flow.settle()
    return Sent(
        everyone,
        own,
        sizes,
        x,
        (per_rank, per_expert, in_rank),
        received,
        idx,
        weights,
        counts,
        handle,
    )


def check_layout(rank: Rank, sent: Sent) -> None:
    per_rank, per_expert, in_rank = (t.cpu() for t in sent.layout)
    local = sent.sizes.num_experts // rank.num_ranks
    own = sent.everyone[rank.rank]
    assert [t.dtype for t in (per_rank, per_expert, in_rank)] == [
        torch.int32,
        torch.int32,
        torch.bool,
    ]
    assert in_rank.shape == (len(own.x), rank.num_ranks)
    for peer in range(rank.num_ranks):
        wanted = going_to(own, peer * local, local)
        assert in_rank[:, peer].nonzero().flatten().tolist() == wanted.tolist()
        assert int(per_rank[peer]) == len(wanted)
    for expert in range(sent.sizes.num_experts):
        assert int(per_expert[expert]) == int((own.topk_idx == expert).sum())


@dataclass
class Wanted:
    """All rows that must arrive here, by source rank, then token."""

    source: torch.Tensor
    token: torch.Tensor
    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor


def wanted_here(rank: Rank, sent: Sent) -> Wanted:
    local = sent.sizes.num_experts // rank.num_ranks
    first = rank.rank * local
    parts = []
    for source, tokens in enumerate(sent.everyone):
        index = going_to(tokens, first, local)
        idx = tokens.topk_idx[index] - first
        here = (idx >= 0) & (idx < local)
        parts.append(
            (
                torch.full_like(index, source),
                index,
                tokens.x[index],
                torch.where(here, idx, -1),
                torch.where(here, tokens.weights[index], 0.0),
            )
        )
    return Wanted(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_rows(sent: Sent, wanted: Wanted, received: Any) -> None:
    """Bit for bit, in order, unquantised or as the sender quantised them."""
    rows = len(wanted.token)
    if not isinstance(received, tuple):
        assert torch.equal(received[:rows].cpu(), wanted.x)
        return
    values, scales = quantise(wanted.x, False)
    got, got_scales = received
    assert got.dtype == torch.float8_e4m3fn
    assert torch.equal(got[:rows].cpu().view(torch.uint8), values.view(torch.uint8))
    assert got_scales.shape == (got.shape[0], sent.sizes.hidden // 128)
    assert torch.equal(got_scales[:rows].cpu(), scales.float())


def check_received(rank: Rank, sent: Sent, *, alignment: int = 1, worst: int = 0) -> None:
    rank.settle()
    check_layout(rank, sent)
    wanted = wanted_here(rank, sent)
    rows = len(wanted.token)
    x = sent.received[0] if isinstance(sent.received, tuple) else sent.received
    assert x.shape == (worst or rows, sent.sizes.hidden)
    check_rows(sent, wanted, sent.received)
    prefix, _, _, src_idx, in_rank, send_head = sent.handle
    assert src_idx.dtype == torch.int32
    assert torch.equal(src_idx[:rows].cpu().long(), wanted.token)
    assert prefix.shape == (rank.num_ranks, rank.num_ranks)
    arrived = torch.bincount(wanted.source, minlength=rank.num_ranks).cumsum(0)
    assert torch.equal(prefix[:, rank.rank].cpu().long(), arrived)
    assert torch.equal(in_rank, sent.layout[2])
    assert send_head.shape == in_rank.shape
    assert torch.equal(send_head >= 0, in_rank)
    if sent.topk_idx is not None:
        check_routes(sent, wanted, worst)
    if worst:
        assert sent.counts == []
        return
    local = sent.sizes.num_experts // rank.num_ranks
    everyone = torch.cat([t.topk_idx for t in sent.everyone])
    for expert in range(local):
        count = int((everyone == rank.rank * local + expert).sum())
        assert sent.counts is not None
        assert sent.counts[expert] == -(-count // alignment) * alignment


def check_routes(sent: Sent, wanted: Wanted, worst: int) -> None:
    rows = len(wanted.token)
    assert sent.topk_idx is not None
    assert sent.weights is not None
    assert sent.topk_idx.dtype == torch.int64
    assert sent.topk_idx.shape == sent.weights.shape == (worst or rows, sent.sizes.topk)
    assert torch.equal(sent.topk_idx[:rows].cpu(), wanted.topk_idx)
    here = wanted.topk_idx >= 0
    assert torch.equal(sent.weights[:rows].cpu()[here], wanted.weights[here])
    assert bool((sent.topk_idx[rows:] == -1).all())


def combine(
    rank: Rank,
    buffer: Buffer,
    sent: Sent,
    flow: Flow,
    *,
    num_biases: int = 0,
    with_weights: bool = True,
) -> None:
    """Send home gain * row from each rank and compare the sum with FP64."""
    rows = len(wanted_here(rank, sent).token)
    x = sent.received
    x = sent.own.x.new_zeros((0, sent.sizes.hidden)) if isinstance(x, tuple) else x
    y = torch.full(x.shape, float("nan"), dtype=torch.bfloat16, device=rank.device)
    y[:rows] = x[:rows] * 2.0 ** -(rank.rank % 3)
    weights = None
    if with_weights and sent.weights is not None:
        weights = torch.where(sent.topk_idx >= 0, sent.weights, 0.0)  # type: ignore[operator]
    biases = [torch.randn_like(sent.own.x.float()).bfloat16() for _ in range(num_biases)]
    flow.settle()
    out, out_weights, event = buffer.combine(
        y,
        sent.handle,
        topk_weights=weights,
        bias=(None, biases[0] if biases else None, tuple(biases))[num_biases],
        **flow.arguments(),
    )
    flow.done(event)
    flow.settle()
    rank.settle()
    own = sent.everyone[rank.rank]
    factors = torch.tensor([2.0 ** -(peer % 3) for peer in range(rank.num_ranks)]).double()
    factor = (sent.layout[2].cpu().double() * factors).sum(1, keepdim=True)
    wanted = own.x.double() * factor + sum(b.cpu().double() for b in biases)
    assert out.dtype == torch.bfloat16
    assert out.shape == own.x.shape
    assert not out.isnan().any()
    assert calc_diff(out, wanted) < LIMIT
    if weights is None:
        assert out_weights is None
        return
    assert out_weights is not None
    kept = torch.where(own.topk_idx >= 0, own.weights, 0.0)
    assert torch.allclose(out_weights.cpu(), kept, rtol=1e-6, atol=0)


def tokens(seed: int, rank: Rank, sizes: Sizes) -> list[Tokens]:
    return draw(seed, sizes, rank.num_ranks)
