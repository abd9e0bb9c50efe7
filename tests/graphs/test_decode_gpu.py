"""DecodeGraphs on one GPU: what is captured, what the audit rejects, what a replay does."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import RankCase, beyond_one_ulp, draw_case
from steps import PAIR, Step, Steps, Tensors

from ep_runtime import Buffer, CaptureError, EpConfig, PeerTimeout, virtual_ranks
from ep_runtime.graphs import DecodeGraphs, driver
from ep_runtime.graphs import nodes as gn

pytestmark = pytest.mark.gpu

RANKS = 2
CONFIG = EpConfig(num_experts=8, topk=2, hidden=256, max_tokens=8)


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    made = virtual_ranks(CONFIG, RANKS, "cuda", [0])
    yield made
    for buffer in made:
        buffer.close()


def make_inputs(rows: int) -> list[Tensors]:
    return [
        {
            "x": torch.zeros((rows, CONFIG.hidden), dtype=torch.bfloat16, device="cuda:0"),
            "idx": torch.full((rows, CONFIG.topk), -1, device="cuda:0"),
            "weights": torch.zeros((rows, CONFIG.topk), device="cuda:0"),
        }
        for _ in range(RANKS)
    ]


def capture(buffers: list[Buffer], step: Step, **options: Any) -> Any:
    return DecodeGraphs(buffers, step, make_inputs, (2, 8), **options)


def draw(counts: tuple[int, ...], seed: int) -> tuple[list[Tensors], list[RankCase]]:
    case = [rank.to(torch.device("cuda:0")) for rank in draw_case(CONFIG, counts, seed)]
    return [{"x": r.x, "idx": r.topk_idx, "weights": r.topk_weights} for r in case], case


def followed_by(step: Step, more: Callable[[], Any]) -> Step:
    def both(inputs: list[Tensors], counts: Sequence[torch.Tensor | None]) -> list[Tensors]:
        outputs = step(inputs, counts)
        more()
        return outputs

    return both


def test_the_graph_holds_our_kernels_and_one_reset_per_rank(buffers: list[Buffer]) -> None:
    audit = capture(buffers, Steps(buffers).of(PAIR, 1)).audit(8)
    assert audit.problems == ()
    assert sum(audit.our_kernels.values()) >= 4 * RANKS
    regions = {buffer.stats_region(1) for buffer in buffers}
    assert {(node.address, node.num_bytes) for node in audit.resets} == regions
    assert len(audit.operations) == 4 * RANKS
    assert {"host", "memory allocation", "memory free"}.isdisjoint(audit.counts)
    assert audit.to_dot().count("shape=hexagon") == RANKS


def test_resets_precede_every_kernel_of_ours(buffers: list[Buffer]) -> None:
    graph = capture(buffers, Steps(buffers).of(PAIR, 0)).audit(2).graph
    ours = {node.index for node in graph.nodes if node.ours}
    for node in graph.nodes:
        if node.kind == gn.MEMSET and node.num_bytes == buffers[0].stats_region(0)[1]:
            assert ours <= gn.reaches(graph.edges, node.index)


def test_statistics_are_those_of_the_last_replay(buffers: list[Buffer]) -> None:
    graphs = capture(buffers, Steps(buffers).of(PAIR, 0))
    inputs, case = draw((5, 8), seed=1)
    for _ in range(3):
        graphs.replay(inputs, (5, 8))
    received = sum(buffer.stats(0).messages_received for buffer in buffers)
    assert received == sum(int(rank.num_messages.sum()) for rank in case)
    graphs.eager(inputs, (5, 8))
    assert sum(buffer.stats(0).messages_received for buffer in buffers) == 2 * received


def test_replay_neither_synchronises_nor_allocates(buffers: list[Buffer]) -> None:
    graphs = capture(buffers, Steps(buffers).of(PAIR, 0))
    inputs, case = draw((3, 1), seed=2)
    graphs.replay(inputs, (3, 1))
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            outputs = graphs.replay(inputs, (3, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for found, wanted in zip(outputs, case, strict=True):
        assert beyond_one_ulp(found["out0"], wanted.out) == 0


@pytest.mark.parametrize("counts", [(0, 0), (0, 8), (1, 2), (8, 8)])
def test_replay_equals_eager_bit_for_bit(buffers: list[Buffer], counts: tuple[int, ...]) -> None:
    graphs = capture(buffers, Steps(buffers).of(PAIR, 0))
    inputs, case = draw(counts, seed=3)
    eager = [rank["out0"].clone() for rank in graphs.eager(inputs, counts)]
    for static in graphs.static_outputs(graphs.buckets.pick(max(counts))):
        static["out0"].fill_(torch.nan)
    replayed = graphs.replay(inputs, counts)
    for found, same, wanted in zip(replayed, eager, case, strict=True):
        assert torch.equal(found["out0"], same)
        assert beyond_one_ulp(found["out0"], wanted.out) == 0


def test_a_copy_to_the_host_is_rejected_with_a_remedy(buffers: list[Buffer]) -> None:
    pinned = torch.zeros(4, pin_memory=True)
    source = torch.ones(4, device="cuda:0")

    def copy_out() -> None:
        pinned.copy_(source, non_blocking=True)

    with pytest.raises(CaptureError, match="copies to the host"):
        capture(buffers, followed_by(Steps(buffers).of(PAIR, 0), copy_out))


def test_a_host_callback_is_rejected(buffers: list[Buffer]) -> None:
    runtime: Any = pytest.importorskip("cuda.bindings.runtime")
    stream_type = runtime.cudaStream_t
    calls: list[int] = []
    callback = runtime.cudaHostFn_t(init_value=_host_function())

    def call_host() -> None:
        if torch.cuda.is_current_stream_capturing():
            stream = stream_type(init_value=torch.cuda.current_stream().cuda_stream)
            (status,) = runtime.cudaLaunchHostFunc(stream, callback, 0)
            assert int(status) == 0
            calls.append(1)

    with pytest.raises(CaptureError, match=r"host\) is not allowed"):
        capture(buffers, followed_by(Steps(buffers).of(PAIR, 0), call_host))
    assert calls == [1]


def test_a_memset_of_memory_that_peers_write_is_rejected(buffers: list[Buffer]) -> None:
    runtime: Any = pytest.importorskip("cuda.bindings.runtime")
    address, num_bytes = buffers[0].heap_regions()[1]

    def clear() -> None:
        if torch.cuda.is_current_stream_capturing():
            stream = runtime.cudaStream_t(init_value=torch.cuda.current_stream().cuda_stream)
            (status,) = runtime.cudaMemsetAsync(address + num_bytes - 128, 0, 128, stream)
            assert int(status) == 0

    with pytest.raises(CaptureError, match=r"memory that peers write \(the heap of rank 1\)"):
        capture(buffers, followed_by(Steps(buffers).of(PAIR, 0), clear))


def _host_function() -> int:
    import ctypes

    address = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p).value  # free(NULL): nothing
    assert address is not None
    return address


def test_a_graph_of_torch_alone_has_no_resets(buffers: list[Buffer]) -> None:
    def double(inputs: list[Tensors], _: Sequence[torch.Tensor | None]) -> list[Tensors]:
        return [{"y": mine["x"] * 2} for mine in inputs]

    graphs = capture(buffers, double)
    assert graphs.audit(2).resets == ()
    assert graphs.audit(2).our_kernels == {}
    inputs, _ = draw((2, 2), seed=4)
    assert torch.equal(graphs.replay(inputs, (2, 2))[1]["y"], inputs[1]["x"] * 2)


def test_a_reset_added_to_a_kept_graph_is_read_back_and_works() -> None:
    scratch = torch.ones(64, dtype=torch.int32, device="cuda:0")
    seen = torch.ones(64, dtype=torch.int32, device="cuda:0")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        seen.copy_(scratch)
        scratch.fill_(7)
    handle = driver.graph_handle(graph.raw_cuda_graph())
    driver.add_reset(handle, driver.list_nodes(handle)[:1], scratch.data_ptr(), 128, 0)
    info = driver.read_graph(handle)
    memset = next(node for node in info.nodes if node.kind == gn.MEMSET)
    assert (memset.address, memset.num_bytes, memset.value) == (scratch.data_ptr(), 128, 0)
    assert len(gn.reaches(info.edges, memset.index)) == 2
    graph.instantiate()
    driver.upload(graph.raw_cuda_graph_exec(), torch.cuda.current_stream().cuda_stream)
    for before in (1, 7):
        graph.replay()
        assert seen.tolist() == [0] * 32 + [before] * 32


def test_what_a_step_raises_over_a_broken_capture_is_raised(buffers: list[Buffer]) -> None:
    source = torch.ones(1, device="cuda:0")
    before = torch.cuda.current_stream()

    def breaks_the_capture() -> None:
        if torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):
                source.item()
            raise LookupError("no such layer")

    with pytest.raises(LookupError, match="no such layer") as caught:
        capture(buffers, followed_by(Steps(buffers).of(PAIR, 0), breaks_the_capture))
    assert isinstance(caught.value.__context__, RuntimeError)  # the capture's own
    assert torch.cuda.current_stream() == before
    assert not torch.cuda.is_current_stream_capturing()
    graphs = capture(buffers, Steps(buffers).of(PAIR, 0))
    inputs, case = draw((5, 8), seed=6)
    for found, wanted in zip(graphs.replay(inputs, (5, 8)), case, strict=True):
        assert beyond_one_ulp(found["out0"], wanted.out) == 0


def test_a_copy_that_waits_for_the_host_fails_as_torch_says(buffers: list[Buffer]) -> None:
    source = torch.ones(1, device="cuda:0")
    before = torch.cuda.current_stream()

    def fetch() -> None:
        source.item()

    with pytest.raises(RuntimeError) as caught:
        capture(buffers, followed_by(Steps(buffers).of(PAIR, 0), fetch))
    assert "fetch" in [entry.name for entry in caught.traceback]
    assert torch.cuda.current_stream() == before


@pytest.mark.parametrize("building", [torch.enable_grad, torch.inference_mode])
def test_every_mode_replays_and_outputs_require_no_gradient(
    buffers: list[Buffer], building: Callable[[], Any]
) -> None:
    ones = torch.ones(CONFIG.hidden, dtype=torch.bfloat16, device="cuda:0", requires_grad=True)
    pair = Steps(buffers).of(PAIR, 0)

    def step(inputs: list[Tensors], counts: Sequence[torch.Tensor | None]) -> list[Tensors]:
        return [{"out0": rank["out0"] * ones} for rank in pair(inputs, counts)]

    with building():
        graphs = capture(buffers, step)
    inputs, case = draw((3, 1), seed=7)
    given = [{**mine, "x": mine["x"].clone().requires_grad_() * 1} for mine in inputs]
    for replaying in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with replaying():
            outputs = graphs.replay(given, (3, 1))
        for found, static, wanted in zip(outputs, graphs.static_inputs(8), case, strict=True):
            assert beyond_one_ulp(found["out0"], wanted.out) == 0
            assert not found["out0"].requires_grad
            assert not static["x"].requires_grad
            found["out0"].add_(1)  # a tensor like any other, in any mode


def test_a_lost_peer_surfaces_at_a_later_replay_and_reset_recovers(buffers: list[Buffer]) -> None:
    graphs = capture(buffers, Steps(buffers).of(PAIR, 0))
    for buffer in buffers:
        buffer.set_time_budget(0.2)
    inputs, case = draw((2, 2), seed=5)
    lonely, mine = buffers[0], inputs[0]
    lonely.dispatch(mine["x"], mine["idx"], mine["weights"], chain=1)
    lonely._ops.dispatch_recv(1, lonely._inboxes[1].target(None, None), 0)  # rank 1 never sends
    torch.cuda.synchronize()
    with pytest.raises(PeerTimeout) as caught:
        graphs.replay(inputs, (2, 2))
    assert caught.value.peer == 1
    for buffer in buffers:
        buffer.reset()
        buffer.set_time_budget(10.0)
    for found, wanted in zip(graphs.replay(inputs, (2, 2)), case, strict=True):
        assert beyond_one_ulp(found["out0"], wanted.out) == 0
