"""What an audit says about graphs given as plain data: no GPU is needed to judge one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ep_runtime.errors import CaptureError
from ep_runtime.graphs import Edge, GraphInfo, NodeInfo, Region, audit_graph, audit_operations
from ep_runtime.graphs import nodes as gn

STATS = Region(0x1000, 616, label="statistics of rank 0 chain 0")


def kernel(index: int, name: str, parent: int = -1) -> NodeInfo:
    return NodeInfo(index, gn.KERNEL, name=name, parent=parent)


def reset(index: int, region: Region = STATS, value: int = 0) -> NodeInfo:
    return NodeInfo(
        index, gn.MEMSET, address=region.address, num_bytes=region.num_bytes, value=value
    )


def line(*nodes: NodeInfo, programmatic: bool = False) -> GraphInfo:
    """Nodes one after the other."""
    pairs = pairwise(nodes)
    return GraphInfo(nodes, tuple(Edge(a.index, b.index, programmatic) for a, b in pairs))


def step(*extra: NodeInfo) -> GraphInfo:
    """A dispatch between two torch kernels, and whatever else, at the end."""
    return line(kernel(0, "gemm"), kernel(1, "ep::dispatch_send"), kernel(2, "gemm"), *extra)


def test_counts_kernels_and_launches() -> None:
    audit = audit_graph(step(NodeInfo(3, gn.EMPTY), NodeInfo(4, gn.MEMSET, num_bytes=4)))
    assert audit.counts == {"kernel": 3, "empty": 1, "memset": 1}
    assert audit.kernels == {"gemm": 2, "ep::dispatch_send": 1}
    assert audit.our_kernels == {"ep::dispatch_send": 1}
    assert audit.launches == 4
    assert audit.problems == ()
    audit.require_clean("the graph")


@pytest.mark.parametrize(
    ("node", "remedy"),
    [
        (NodeInfo(3, gn.MEM_ALLOC), "allocate before the capture"),
        (NodeInfo(3, gn.MEM_FREE), "free after"),
        (NodeInfo(3, gn.HOST), "out of the step"),
        (NodeInfo(3, gn.MEMCPY, source="device", target="host", num_bytes=8), r"\.item\(\)"),
    ],
)
def test_what_would_stall_a_rank_is_rejected_with_a_remedy(node: NodeInfo, remedy: str) -> None:
    audit = audit_graph(step(node))
    with pytest.raises(CaptureError, match=remedy) as caught:
        audit.require_clean("the graph of 8")
    assert "the graph of 8" in str(caught.value)
    assert "node 3" in str(caught.value)


def test_a_rejected_node_is_found_inside_a_child_graph() -> None:
    child = NodeInfo(3, gn.CHILD)
    inner = NodeInfo(4, gn.HOST, parent=3)
    graph = step(child)
    audit = audit_graph(GraphInfo((*graph.nodes, inner), graph.edges))
    assert len(audit.problems) == 1
    assert "in child graph 3" in audit.problems[0]


def test_copies_on_the_device_are_allowed_and_copies_from_the_host_noted() -> None:
    inside = NodeInfo(3, gn.MEMCPY, source="device", target="device", num_bytes=64)
    inward = NodeInfo(4, gn.MEMCPY, source="host", target="device", num_bytes=64)
    audit = audit_graph(step(inside, inward))
    assert audit.problems == ()
    assert len(audit.notes) == 1
    assert "node 4" in audit.notes[0]


def test_a_memset_of_memory_that_peers_write_is_a_race() -> None:
    heap = Region(0x8000, 4096, label="heap of rank 0")
    clears = NodeInfo(3, gn.MEMSET, address=0x8F00, num_bytes=4096)
    beside = NodeInfo(4, gn.MEMSET, address=0x9000, num_bytes=64)
    audit = audit_graph(step(clears, beside), shared=[heap])
    assert len(audit.problems) == 1
    assert "heap of rank 0" in audit.problems[0]
    assert "node 3" in audit.problems[0]


def with_reset(memset: NodeInfo, *edges: Edge) -> GraphInfo:
    base = step()
    return GraphInfo((*base.nodes, memset), (*base.edges, *edges))


def test_a_reset_ahead_of_our_first_kernel_is_listed() -> None:
    audit = audit_graph(with_reset(reset(3), Edge(3, 1)), resets=[STATS])
    assert [node.index for node in audit.resets] == [3]
    assert audit.problems == ()
    assert "memset of 616 bytes at 0x1000 to 0" in audit.to_text()


@pytest.mark.parametrize(
    ("graph", "complaint"),
    [
        (step(), "0 memset nodes reset 616 bytes"),
        (with_reset(reset(3, value=1), Edge(3, 1)), "wanted one to 0"),
        (with_reset(reset(3, Region(0x1000, 608)), Edge(3, 1)), "0 memset nodes"),
        (with_reset(reset(3)), r"not ordered before our kernel nodes \[1\]"),
        (with_reset(reset(3), Edge(1, 3)), "not ordered before"),
    ],
    ids=["missing", "wrong value", "too short", "unordered", "after"],
)
def test_a_reset_that_does_not_do_its_work_is_rejected(graph: GraphInfo, complaint: str) -> None:
    with pytest.raises(CaptureError, match=complaint):
        audit_graph(graph, resets=[STATS]).require_clean("the graph")


def test_every_branch_must_wait_for_the_reset() -> None:
    nodes = (kernel(0, "ep::dispatch_send"), kernel(1, "ep::dispatch_send"), reset(2))
    one = audit_graph(GraphInfo(nodes, (Edge(2, 0),)), resets=[STATS])
    both = audit_graph(GraphInfo(nodes, (Edge(2, 0), Edge(2, 1))), resets=[STATS])
    assert "our kernel nodes [1]" in one.problems[0]
    assert both.problems == ()


def test_first_kernels_are_ours_and_one_per_branch() -> None:
    nodes = [kernel(i, name) for i, name in enumerate(["gemm", "ep::a", "ep::b", "ep::c", "ep::d"])]
    edges = [Edge(0, 1), Edge(1, 2), Edge(0, 3), Edge(2, 4), Edge(3, 4)]
    assert gn.first_kernels(nodes, edges) == [1, 3]


def test_first_kernels_do_not_depend_on_the_order_of_nodes() -> None:
    nodes = [kernel(0, "ep::last"), kernel(1, "ep::first")]
    assert gn.first_kernels(nodes, [Edge(1, 0)]) == [1]


def test_a_child_graph_with_our_kernel_counts_as_one() -> None:
    nodes = [NodeInfo(0, gn.CHILD), kernel(1, "ep::b"), kernel(2, "ep::a", parent=0)]
    assert gn.first_kernels(nodes, [Edge(0, 1)]) == [0]


def test_resets_join_where_a_kernel_starts_by_full_edges() -> None:
    names = ["gemm", "gemm", "ep::a", "ep::b"]
    nodes = [kernel(i, name) for i, name in enumerate(names)]
    edges = [Edge(0, 1), Edge(1, 2, programmatic=True), Edge(2, 3, programmatic=True)]
    assert gn.reset_anchors(nodes, edges) == [1]
    assert gn.reset_anchors(nodes, [Edge(0, 1), Edge(1, 2), Edge(2, 3)]) == [2]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN2ep20dispatch_send_kernelENS_16DispatchSendArgsE", "ep::dispatch_send_kernel"),
        ("_ZN2ep19combine_recv_kernelILi2EEEvNS_15CombineRecvArgsE", "ep::combine_recv_kernel"),
        ("_ZN2ep4cuda13dispatch_recvILi4EEEvNS_5ShapeE", "ep::cuda::dispatch_recv"),
        ("_ZN2ep50_GLOBAL__N__0123456789012345678901234567890123456789"[:60], None),
        ("_ZN2ep12_GLOBAL__N_14sendEv", "ep::send"),
        ("_Z6vecaddPfS_i", "vecadd"),
        ("_ZL6vecaddPfS_i", "vecadd"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("_ZN2at6native18elementwise_kernelILi512EEEvi", "at::native::elementwise_kernel"),
        ("_ZTV4thing", "_ZTV4thing"),
    ],
)
def test_kernel_names_are_readable(symbol: str, name: str | None) -> None:
    assert gn.readable_name(symbol) == (symbol if name is None else name)


def test_only_kernels_of_our_namespace_are_ours() -> None:
    assert kernel(0, "ep::send").ours
    assert not kernel(0, "episode::send").ours
    assert not NodeInfo(0, gn.MEMSET, name="ep::send").ours


def test_dot_shows_every_node_and_edge() -> None:
    base = line(kernel(0, 'odd"name'), kernel(1, "ep::dispatch_send"), programmatic=True)
    graph = GraphInfo((*base.nodes, reset(2)), (*base.edges, Edge(2, 1)))
    dot = audit_graph(graph, resets=[STATS]).to_dot()
    assert dot.startswith("digraph step {")
    assert 'n0 [label="kernel odd\\"name"];' in dot
    assert 'n1 [label="kernel ep::dispatch_send", style=filled, fillcolor="lightblue"];' in dot
    assert "shape=hexagon" in dot
    assert "n0 -> n1 [style=dashed];" in dot
    assert "n2 -> n1;" in dot
    assert audit_graph(graph).programmatic_edges == 1


def test_recorded_operations_are_counted_by_kind() -> None:
    audit = audit_operations(["dispatch_send chain 0 rank 0", "dispatch_recv chain 0 rank 0"])
    assert audit.counts == {"dispatch_send": 1, "dispatch_recv": 1}
    assert audit.launches == 2
    assert "n0 -> n1;" in audit.to_dot()
