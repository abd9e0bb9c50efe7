"""Worst-case dispatches and combines in CUDA graphs, replayed with routes that change.

Virtual ranks on one GPU: each rank's graph is captured and replayed on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import programs
import pytest
import torch
from expect import check_received, random_group, random_tokens
from ranks import ThreadGroup
from support import new_rng

from ep_runtime import CaptureError
from ep_runtime.normal import NormalBuffer, NormalReceived
from ep_runtime.normal.reference import RankTokens

pytestmark = pytest.mark.gpu

HIDDEN, TOPK, MOST = 1024, 4, 96
REPLAYS = 1000


@dataclass
class Captured:
    """One rank's graph: dispatch, double every row, combine."""

    buffer: NormalBuffer
    stream: torch.cuda.Stream
    graph: torch.cuda.CUDAGraph
    x: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor
    received: NormalReceived
    out: torch.Tensor

    def load(self, tokens: RankTokens) -> None:
        with torch.cuda.stream(self.stream):
            self.x.copy_(tokens.x, non_blocking=True)
            self.idx.copy_(tokens.topk_idx, non_blocking=True)
            self.weights.copy_(tokens.topk_weights, non_blocking=True)
            self.out.fill_(float("nan"))

    def right(self) -> bool:
        """Every rank doubled the row: the sum of as many equal terms is exact in FP32."""
        with torch.cuda.stream(self.stream):
            owners = self.idx // (self.experts // self.buffer.num_ranks)
            ranks = torch.arange(self.buffer.num_ranks, device=self.x.device)
            goes = ((owners.unsqueeze(2) == ranks) & (self.idx >= 0).unsqueeze(2)).any(1)
            wanted = ((2 * self.x).float() * goes.sum(1, keepdim=True)).bfloat16()
            return bool(torch.equal(wanted, self.out))

    @property
    def experts(self) -> int:
        return self.received.handle.num_experts


def capture(buffer: NormalBuffer, stream: torch.cuda.Stream, experts: int) -> Captured:
    device = buffer.device
    x = torch.zeros((MOST, HIDDEN), dtype=torch.bfloat16, device=device)
    idx = torch.full((MOST, TOPK), -1, dtype=torch.int64, device=device)
    weights = torch.zeros((MOST, TOPK), device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        received = buffer.dispatch(
            x, idx, weights, num_experts=experts, num_worst_tokens=MOST * buffer.num_ranks
        )
        out, _ = buffer.combine(received.x * 2, received.handle)
    return Captured(buffer, stream, graph, x, idx, weights, received, out)


@pytest.fixture(params=[2, 4, 8])
def group(request: pytest.FixtureRequest) -> Iterator[ThreadGroup]:
    opened = ThreadGroup(
        request.param, "cuda", (0,), max_tokens=MOST, max_hidden=HIDDEN, max_experts=64, max_topk=8
    )
    yield opened
    opened.close()


def capture_all(group: ThreadGroup, experts: int) -> list[Captured]:
    torch.cuda.synchronize()
    graphs = []
    for buffer, stream in zip(group.buffers, group.streams, strict=True):
        assert stream is not None
        graphs.append(capture(buffer, stream, experts))
    torch.cuda.synchronize()
    return graphs


def replay(graphs: list[Captured]) -> None:
    for one in graphs:
        with torch.cuda.stream(one.stream):
            one.graph.replay()


def eager_pair(group: ThreadGroup, rng: torch.Generator, experts: int) -> None:
    inputs = random_group(rng, group.num_ranks, HIDDEN, TOPK, experts, MOST)
    got = group.run(programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs])
    check_received(got, inputs, experts)


@pytest.mark.slow
def test_replays_with_changing_routes(group: ThreadGroup) -> None:
    rng, experts = new_rng(), 4 * group.num_ranks
    eager_pair(group, rng, experts)  # loads what the kernels need
    graphs = capture_all(group, experts)
    inputs = [[random_tokens(rng, MOST, HIDDEN, TOPK, experts) for _ in graphs] for _ in range(8)]
    for turn in range(REPLAYS):
        tokens = [
            inputs[int(torch.randint(8, (), generator=rng))][rank] for rank in range(len(graphs))
        ]
        for one, mine in zip(graphs, tokens, strict=True):
            one.load(mine)
        replay(graphs)
        assert all(one.right() for one in graphs), f"replay {turn}"
        if turn % 100 == 0:
            rows = []
            for one in graphs:
                with torch.cuda.stream(one.stream):
                    rows.append(programs.snapshot(one.buffer, one.received))
            for mine in rows:
                mine.x = mine.x.clone()
            _check_rows(rows, tokens, experts)
            eager_pair(group, rng, experts)  # eager calls mix with replays
    for buffer in group.buffers:
        buffer.check()


def _check_rows(rows: list[programs.Rows], tokens: list[RankTokens], experts: int) -> None:
    """Rows of earlier replays lie behind the last one: poison them before the comparison."""
    for rank, mine in enumerate(rows):
        count = int(mine.rank_prefix[-1, rank])
        mine.x[count:].view(torch.uint8).fill_(programs.POISON)
    check_received(rows, tokens, experts, worst=MOST * len(tokens))


def test_graphs_keep_their_memory(group: ThreadGroup) -> None:
    """What a graph writes to is handed to nobody else, also when its tensors are gone."""
    rng, experts = new_rng(), 4 * group.num_ranks
    eager_pair(group, rng, experts)
    graphs = capture_all(group, experts)
    for one in graphs:
        one.received = None  # type: ignore[assignment]
    inputs = [random_tokens(rng, MOST, HIDDEN, TOPK, experts, idle=0) for _ in graphs]
    got = group.run(programs.dispatch_with, [(one, {"num_experts": experts}) for one in inputs])
    held = [programs.kept(buffer, "last").x for buffer in group.buffers]
    for one in graphs:
        one.load(random_tokens(rng, MOST, HIDDEN, TOPK, experts, idle=0))
    replay(graphs)
    torch.cuda.synchronize()
    for rows, now in zip(got, held, strict=True):
        assert torch.equal(rows.x.view(torch.uint8), now.cpu().view(torch.uint8))


def test_a_capture_cannot_wait_or_grow(group: ThreadGroup) -> None:
    buffer, stream = group.buffers[0], group.streams[0]
    assert stream is not None
    x = torch.zeros((MOST, HIDDEN), dtype=torch.bfloat16, device=buffer.device)
    idx = torch.zeros((MOST, TOPK), dtype=torch.int64, device=buffer.device)
    weights = torch.zeros((MOST, TOPK), device=buffer.device)
    experts = 4 * group.num_ranks
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        with pytest.raises(CaptureError, match="num_worst_tokens"):
            buffer.dispatch(x, idx, weights, num_experts=experts)
        with pytest.raises(CaptureError, match="reserve"):
            buffer.dispatch(
                x, idx, weights, num_experts=experts, num_worst_tokens=100 * MOST * group.num_ranks
            )
        torch.zeros(1, device=buffer.device)  # a graph holds something
