"""Groups with nodes on one GPU: as processes under MPS by every way between nodes, and captured."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import node_groups
import programs
import pytest
import torch
from expect import check_received, random_group, random_results, random_tokens
from mps import daemon, share_of
from node_groups import check_near, sum_by_nodes
from ranks import Processes, ProcessGroup, ThreadGroup
from support import new_rng
from test_normal_capture import HIDDEN, MOST, TOPK, capture_all
from test_normal_capture import REPLAYS as MANY

pytestmark = pytest.mark.gpu

RANKS, PER_NODE, EXPERTS = 4, 2, 32
REPLAYS = MANY // 10
# Four ranks of NVSHMEM on one host without a network: what each process must be told.
NVSHMEM = {
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
    "NVSHMEM_CUMEM_GRANULARITY": str(64 << 20),
}


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with daemon(tmp_path_factory.mktemp("mps")) as found:
        yield found


def pair(group: ProcessGroup, rng: torch.Generator, turn: int, most: int, hidden: int) -> None:
    worst = 0 if turn % 2 else most * RANKS
    scales = "float32" if turn % 3 == 1 else None
    inputs = random_group(rng, RANKS, hidden, 8, EXPERTS, most, scales=scales)
    options = {"num_experts": EXPERTS, "num_worst_tokens": worst, "expert_alignment": 1 + turn}
    group.run(programs.forget)
    group.run(programs.poison)
    got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
    expected = check_received(got, inputs, EXPERTS, alignment=1 + turn, worst=worst)
    rows, weights = random_results(rng, expected, hidden, 8, worst)
    tokens = [one.x.shape[0] for one in inputs]
    bias = [[torch.randn((t, hidden), generator=rng).bfloat16()] for t in tokens]
    back = group.run(
        programs.combine, [(y, w, b) for y, w, b in zip(rows, weights, bias, strict=True)]
    )
    for which, given, added in ((0, rows, bias), (1, weights, None)):
        right = sum_by_nodes(given, expected, tokens, PER_NODE, added)
        for rank, one in enumerate(back):
            assert torch.equal(one[which], right[rank]), f"rank {rank}: order of additions"
        check_near([one[which] for one in back], given, expected, tokens, added)
    again = group.run(programs.cached, [(one, "last", True) for one in inputs])
    for rank, (mine, before) in enumerate(zip(again, got, strict=True)):
        count = len(expected[rank].source)
        assert torch.equal(mine.x[:count].view(torch.uint8), before.x[:count].view(torch.uint8))
        assert torch.equal(mine.source_token[:count], before.source_token[:count])


@pytest.mark.parametrize("between", ["direct", "puts", "nvshmem"])
def test_processes_that_share_a_gpu_match_the_reference(mps: dict[str, str], between: str) -> None:
    if between == "nvshmem" and importlib.util.find_spec("ep_runtime._nvshmem") is None:
        pytest.skip("ep_runtime._nvshmem was not built (nvcc or nvidia-nvshmem-cu13 is missing)")
    pool = Processes(RANKS, "cuda", {**mps, **share_of(RANKS), **NVSHMEM})
    rng = new_rng()
    try:
        group = ProcessGroup(
            pool,
            max_tokens=300,
            max_hidden=7168,
            max_experts=EXPERTS,
            max_topk=8,
            ranks_per_node=PER_NODE,
            between_nodes=between,
        )
        for turn in range(4):
            pair(group, rng, turn, 300, 7168)
        inputs = [random_tokens(rng, 40, 256, 8, EXPERTS) for _ in range(RANKS)]
        group.run(programs.poison)
        group.run(programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs])
        came = group.run(node_groups.crossed, [("last", 512, 0, 8)] * RANKS)
        goes = node_groups.goes_to_node(inputs, EXPERTS, RANKS // PER_NODE)
        for rank, (counted, _) in enumerate(came):
            node, local = divmod(rank, PER_NODE)
            sources = range(local, RANKS, PER_NODE)
            assert counted == sum(int(goes[source][:, node].sum()) for source in sources)
        group.close()
    finally:
        pool.stop()


@pytest.mark.parametrize("between", ["direct", "puts"])
def test_captured_with_routes_that_change(between: str) -> None:
    """Worst-case dispatch and combine over rails and nodes, replayed; half of it between eager
    calls."""
    rng = new_rng()
    group = ThreadGroup(
        RANKS,
        "cuda",
        (0,),
        max_tokens=MOST,
        max_hidden=HIDDEN,
        max_experts=64,
        max_topk=8,
        ranks_per_node=PER_NODE,
        between_nodes=between,
    )
    inputs = [random_tokens(rng, MOST, HIDDEN, TOPK, EXPERTS) for _ in range(RANKS)]
    options = {"num_experts": EXPERTS, "num_worst_tokens": MOST * RANKS}
    for _ in range(2):
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        group.run(
            programs.combine, [(torch.zeros(one.x.shape).bfloat16(), None, []) for one in got]
        )
    group.run(programs.forget)
    graphs = capture_all(group, EXPERTS)
    for turn in range(REPLAYS):
        if turn % 10 == 0:
            for one in graphs:
                one.load(random_tokens(rng, MOST, HIDDEN, TOPK, EXPERTS))
            torch.cuda.synchronize()
        for one in graphs:
            with torch.cuda.stream(one.stream):
                one.graph.replay()
        if turn % 10 == 9:
            torch.cuda.synchronize()
            assert all(one.right() for one in graphs), f"replay {turn}"
        if turn == REPLAYS // 2:
            torch.cuda.synchronize()
            got = group.run(
                programs.dispatch_with, [(one, {"num_experts": EXPERTS}) for one in inputs]
            )
            check_received(got, inputs, EXPERTS)
    for buffer in group.buffers:
        buffer.check()
    group.close()
