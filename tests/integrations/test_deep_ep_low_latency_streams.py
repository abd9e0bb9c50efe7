"""Low-latency calls in captures and on several streams, on GPUs."""

from __future__ import annotations

import pytest
import torch
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import (
    MODES,
    Format,
    check_received,
    combine,
    dispatch,
    finish,
    mode_arguments,
    open_buffer,
)
from traffic import Sizes

SIZES = Sizes(num_experts=8, topk=3, hidden=1024, max_tokens=12)
BF16 = Format()


def captured(rank: Rank, seed: int, mode: str) -> None:
    """A pair in a graph, replayed with other tokens; eager calls in between."""
    buffer = open_buffer(rank, SIZES)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, BF16, mode))  # loads, allocates
    rows = SIZES.max_tokens
    x = torch.zeros((rows, SIZES.hidden), dtype=torch.bfloat16, device=rank.device)
    idx = torch.zeros((rows, SIZES.topk), dtype=torch.int64, device=rank.device)
    weights = torch.zeros((rows, SIZES.topk), device=rank.device)
    rank.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        received, _, handle, event, hook = buffer.low_latency_dispatch(
            x, idx, rows, SIZES.num_experts, use_fp8=False, **mode_arguments(mode)
        )
        finish(mode, event, hook)
        out, event, hook = buffer.low_latency_combine(
            received * 2, idx, weights, handle, **mode_arguments(mode)
        )
        finish(mode, event, hook)
    rank.barrier()
    rng = torch.Generator().manual_seed(seed + rank.rank)
    for turn in range(20):
        x.copy_(torch.randn(x.shape, generator=rng))
        scores = torch.rand((rows, SIZES.num_experts), generator=rng)
        idx.copy_(scores.argsort(1)[:, : SIZES.topk])
        idx[turn % rows] = -1
        weights.copy_(torch.rand(weights.shape, generator=rng))
        graph.replay()
        rank.settle()
        factor = (weights * (idx >= 0)).double().sum(1, keepdim=True)
        wanted = 2 * x.double() * factor
        error = (out.double() - wanted).norm() / wanted.norm()
        assert float(error) < 1e-2, f"replay {turn}: off by {float(error)}"
        if turn % 3 == 0:
            sent = dispatch(rank, buffer, SIZES, seed + turn, Format(True), mode)
            combine(rank, buffer, sent, mode)
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("mode", MODES)
def test_captured_pairs_replay_between_eager_calls(
    gpu_pair: RankPool, seed: int, mode: str
) -> None:
    gpu_pair.run(captured, seed, mode)


def refuses_first_call_in_capture(rank: Rank) -> str:
    buffer = open_buffer(rank, SIZES)
    x = torch.zeros((2, SIZES.hidden), dtype=torch.bfloat16, device=rank.device)
    idx = torch.zeros((2, SIZES.topk), dtype=torch.int64, device=rank.device)
    text = ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        try:
            buffer.low_latency_dispatch(x, idx, 4, SIZES.num_experts)
        except RuntimeError as error:
            text = f"{type(error).__name__}: {error}"
        x.add_(1)  # an empty capture would warn
    buffer.destroy()
    return text


@pytest.mark.gpu
@pytest.mark.alone
def test_first_call_in_a_capture_is_refused(gpu_pair: RankPool) -> None:
    for text in gpu_pair.run(refuses_first_call_in_capture):
        assert text.startswith("CaptureError")
        assert "eager call" in text


def runs_beside(rank: Rank, seed: int) -> None:
    """An asynchronous combine is ordered behind its event alone, on the communication stream."""
    buffer = open_buffer(rank, SIZES)
    stream = buffer.get_comm_stream()
    assert stream.device == rank.device
    assert stream != torch.cuda.current_stream()
    sent = dispatch(rank, buffer, SIZES, seed, BF16, "async")
    combine(rank, buffer, sent, "async")
    plain = dispatch(rank, buffer, SIZES, seed + 1, BF16, "plain")  # behind the last async one
    combine(rank, buffer, plain, "hook")
    rank.settle()
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.alone
def test_asynchronous_calls_use_the_communication_stream(gpu_pair: RankPool, seed: int) -> None:
    gpu_pair.run(runs_beside, seed)


def on_two_streams(rank: Rank, seed: int) -> None:
    """The first stream is late on rank 0: its call still comes before that of the second."""
    buffer = open_buffer(rank, SIZES)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, BF16, "plain"))
    rank.settle()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    sent = []
    for turn, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if turn == rank.rank == 0:
                torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
            sent.append(dispatch(rank, buffer, SIZES, seed + 1 + turn, BF16, "plain"))
    rank.settle()
    for one in sent:
        check_received(rank, one)
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.alone
def test_calls_on_two_streams_come_in_the_order_in_which_they_were_made(
    gpu_pair: RankPool, seed: int
) -> None:
    gpu_pair.run(on_two_streams, seed)
