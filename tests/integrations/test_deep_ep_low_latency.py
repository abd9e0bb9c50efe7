"""Every argument of the low-latency calls, on CPU processes and on GPUs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import (
    FORMATS,
    MODES,
    Format,
    check_received,
    combine,
    dispatch,
    experts,
    open_buffer,
)
from traffic import Sizes

from ep_runtime import env
from ep_runtime.integrations.deep_ep import Buffer

SIZES = Sizes(num_experts=8, topk=3, hidden=1024, max_tokens=12)
FP8_LIMIT = 1.5e-3  # calc_diff of rows that were rounded to e4m3 on both ways
BF16 = Format()


def round_trips(rank: Rank, seed: int, fmt: Format, mode: str, sizes: Sizes) -> None:
    buffer = open_buffer(rank, sizes)
    for turn in range(4):
        sent = dispatch(rank, buffer, sizes, seed + turn, fmt, mode)
        check_received(rank, sent)
        combine(rank, buffer, sent, mode)
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["bf16", "fp8", "fp8-rounded", "ue8m0"])
def test_round_trip(pool: RankPool, seed: int, fmt: Format, mode: str) -> None:
    pool.run(round_trips, seed, fmt, mode, SIZES)


@pytest.mark.parametrize("fmt", [BF16, Format(True)], ids=["bf16", "fp8"])
def test_sizes_that_no_list_holds(pair: RankPool, seed: int, fmt: Format) -> None:
    """A hidden size, a top-k and a number of experts that DeepEP was not compiled for."""
    pair.run(round_trips, seed, fmt, "hook", Sizes(54, 17, 640, 5))


def uneven(rank: Rank, seed: int, mode: str) -> None:
    """EP_EVEN_TOKENS sizes launches by the call's own tokens, though ranks send other numbers."""
    with env.defaults({"EP_EVEN_TOKENS": "1"}):
        buffer = open_buffer(rank, SIZES)
    for turn in range(4):
        sent = dispatch(rank, buffer, SIZES, seed + turn, Format(True), mode)
        assert sent.handle.routing.expected_tokens == len(sent.own.x)
        check_received(rank, sent)
        combine(rank, buffer, sent, mode)
    buffer.destroy()


@pytest.mark.parametrize("mode", ["plain", "hook"])
def test_ranks_that_expect_too_few_tokens_get_all(pool: RankPool, seed: int, mode: str) -> None:
    pool.run(uneven, seed, mode)


def any_order(rank: Rank, seed: int, mode: str) -> None:
    """Dispatches run ahead of combines; combines come in another order than their dispatches."""
    buffer = open_buffer(rank, SIZES)
    formats = [BF16, Format(True), Format(True, True, True)]
    sent = [dispatch(rank, buffer, SIZES, seed + i, f, mode) for i, f in enumerate(formats)]
    for one in sent:  # receive memory is each dispatch's own
        check_received(rank, one)
    for one in (sent[1], sent[0], sent[2]):
        combine(rank, buffer, one, mode)
    last = dispatch(rank, buffer, SIZES, seed + 9, BF16, mode)
    combine(rank, buffer, sent[0], mode)  # after other traffic
    combine(rank, buffer, last, mode)
    check_received(rank, sent[1])
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
def test_dispatches_and_combines_in_any_order(pool: RankPool, seed: int, mode: str) -> None:
    pool.run(any_order, seed, mode)


def combined_again(rank: Rank, seed: int) -> None:
    buffer = open_buffer(rank, SIZES)
    sent = dispatch(rank, buffer, SIZES, seed, BF16, "plain")
    first = combine(rank, buffer, sent)
    combine(rank, buffer, sent, weights=sent.own.weights.flip(0) + 0.5)
    assert torch.equal(combine(rank, buffer, sent, "hook"), first)
    buffer.destroy()


def test_one_handle_serves_many_combines(pool: RankPool, seed: int) -> None:
    pool.run(combined_again, seed)


def hooks_overlap(rank: Rank, seed: int) -> None:
    """Between send and hook both other kinds of work and the other send happen."""
    buffer = open_buffer(rank, SIZES)
    a = dispatch(rank, buffer, SIZES, seed, BF16, "plain")
    y = experts(rank, a)
    out, _, receive_a = buffer.low_latency_combine(
        y, a.own.topk_idx, a.own.weights, a.handle, return_recv_hook=True
    )
    b = dispatch(rank, buffer, SIZES, seed + 1, BF16, "hook")  # a's combine is still under way
    receive_a()
    rank.settle()
    assert torch.equal(out, combine(rank, buffer, a))
    check_received(rank, b)
    combine(rank, buffer, b)
    buffer.destroy()


def test_a_dispatch_goes_out_before_a_combine_is_received(pool: RankPool, seed: int) -> None:
    pool.run(hooks_overlap, seed)


def outputs(rank: Rank, seed: int, mode: str) -> None:
    """out= and zero_copy= change where rows lie, not what they are; use_logfmt= rounds them."""
    buffer = open_buffer(rank, SIZES)
    sent = dispatch(rank, buffer, SIZES, seed, BF16, "plain")
    plain = combine(rank, buffer, sent, mode)
    out = torch.full_like(sent.own.x, float("nan"))
    assert combine(rank, buffer, sent, mode, out=out) is out
    short = combine(rank, buffer, sent, mode, most=FP8_LIMIT, use_logfmt=True)
    assert torch.equal(short, plain) == (not plain.any())
    y = experts(rank, sent)
    rows = buffer.get_next_low_latency_combine_buffer(sent.handle)
    assert rows.shape == y.shape
    assert rows.dtype == y.dtype
    rows[:] = y
    garbage = torch.full_like(y, float("nan"))  # its content does not count
    assert torch.equal(combine(rank, buffer, sent, mode, y=garbage, zero_copy=True), plain)
    rows[:] = experts(rank, sent)
    assert torch.equal(combine(rank, buffer, sent, mode, y=rows, zero_copy=True), plain)
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
def test_out_zero_copy_and_logfmt(pool: RankPool, seed: int, mode: str) -> None:
    pool.run(outputs, seed, mode)


def statistics(rank: Rank, seed: int, mode: str) -> None:
    """Counts and waits are added to what the tensors hold; a late rank's wait is the longest."""
    buffer = open_buffer(rank, SIZES)
    local = SIZES.num_experts // rank.num_ranks
    counts = torch.arange(local, dtype=torch.int32, device=rank.device)
    waits = torch.full((rank.num_ranks,), 7, dtype=torch.int64, device=rank.device)
    back = waits.clone()
    wanted = counts.clone()
    for turn in range(3):
        rank.barrier()
        if rank.rank == 1:
            time.sleep(0.05)
        sent = dispatch(
            rank,
            buffer,
            SIZES,
            seed + turn,
            BF16,
            mode,
            cumulative_local_expert_recv_stats=counts,
            dispatch_wait_recv_cost_stats=waits,
        )
        rank.settle()
        wanted += sent.count
        assert torch.equal(counts, wanted)
        rank.barrier()
        if rank.rank == 1:
            time.sleep(0.05)
        combine(rank, buffer, sent, mode, combine_wait_recv_cost_stats=back)
    for told in (waits, back):
        assert int(told.min()) >= 7
    if rank.rank != 1:
        # A rank that sends no token to rank 1 has nothing to wait for in a combine.
        assert int(waits[1]) > 45_000_000, f"ns waited: {waits.tolist()}"
        assert int(waits[1]) < 10_000_000_000
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_counts_and_waits(pool: RankPool, seed: int, mode: str) -> None:
    pool.run(statistics, seed, mode)


def several_sizes(rank: Rank, seed: int) -> None:
    """Other sizes, also back and forth, and a second Buffer of the same group in between."""
    buffer, other = open_buffer(rank, SIZES), open_buffer(rank, SIZES)
    for turn, sizes in enumerate(
        (SIZES, Sizes(8, 3, 1024, 31), Sizes(16, 5, 512, 12), SIZES, Sizes(16, 5, 512, 12))
    ):
        one, two = (
            dispatch(rank, b, sizes, seed + 2 * turn + i, Format(True), "hook")
            for i, b in enumerate((buffer, other))
        )
        for b, sent in ((other, two), (buffer, one)):
            check_received(rank, sent)
            combine(rank, b, sent)
    buffer.clean_low_latency_buffer(SIZES.max_tokens, SIZES.hidden, SIZES.num_experts)
    sent = dispatch(rank, buffer, SIZES, seed, BF16, "plain")
    combine(rank, buffer, sent)
    other.destroy()
    buffer.destroy()


def test_sizes_change_and_buffers_live_side_by_side(pool: RankPool, seed: int) -> None:
    pool.run(several_sizes, seed)


def masks(rank: Rank) -> None:
    buffer = open_buffer(rank, SIZES, enable_shrink=True)
    status = torch.full((rank.num_ranks,), 9, dtype=torch.int32, device=rank.device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * rank.num_ranks
    buffer.low_latency_update_mask_buffer(1, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r == 1) for r in range(rank.num_ranks)]
    buffer.low_latency_update_mask_buffer(1)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * rank.num_ranks
    buffer.low_latency_update_mask_buffer(0, True)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * rank.num_ranks
    sent = dispatch(rank, buffer, SIZES, 1, BF16, "plain")
    combine(rank, buffer, sent)
    buffer.low_latency_update_mask_buffer(1, True)  # now it lies on the device
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r == 1) for r in range(rank.num_ranks)]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * rank.num_ranks
    buffer.destroy()


def test_mask_calls(pool: RankPool) -> None:
    pool.run(masks)


def left_out(rank: Rank, seed: int, mode: str) -> None:
    """The last rank is masked and stays away; later it is there again."""
    buffer = open_buffer(rank, SIZES, enable_shrink=True)
    gone = rank.num_ranks - 1
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, BF16, mode), mode)
    rank.barrier()
    if rank.rank != gone:
        buffer.low_latency_update_mask_buffer(gone, True)
        for turn in range(3):
            sent = dispatch(rank, buffer, SIZES, seed + turn, BF16, mode, masked={gone})
            check_received(rank, sent)
            combine(rank, buffer, sent, mode)
        buffer.low_latency_clean_mask_buffer()
    rank.barrier()
    sizes = SIZES.max_tokens, SIZES.hidden, SIZES.num_experts
    buffer.clean_low_latency_buffer(*sizes)
    sent = dispatch(rank, buffer, SIZES, seed, BF16, mode)
    check_received(rank, sent)
    combine(rank, buffer, sent, mode)
    buffer.destroy()


@pytest.mark.parametrize("mode", MODES)
def test_the_others_do_without_a_masked_rank(pool: RankPool, seed: int, mode: str) -> None:
    pool.run(left_out, seed, mode)


def lives_without_destroy(rank: Rank, seed: int) -> None:
    """A Buffer that is dropped harms nobody, neither its group nor its successor."""
    for turn in range(2):
        buffer = Buffer(rank.group, low_latency_mode=True)
        combine(rank, buffer, dispatch(rank, buffer, SIZES, seed + turn, BF16, "plain"))
        del buffer
        dist.barrier(rank.group)


def test_a_dropped_buffer_harms_nobody(pool: RankPool, seed: int) -> None:
    pool.run(lives_without_destroy, seed)
