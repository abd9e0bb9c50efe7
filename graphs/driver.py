"""CUDA's driver API for graphs, through cuda-python: thin calls, no decisions.

Only calls of the CUDA 13.0 API are used, so that a 580 driver serves. Nothing is imported until it
is called: a host-only installation needs neither driver nor cuda-python.
"""

from __future__ import annotations

import importlib
from typing import Any

from ep_runtime.errors import BuildError, CudaError
from ep_runtime.graphs import nodes as gn
from ep_runtime.graphs.nodes import Edge, GraphInfo, NodeInfo

# What this module calls; a test compares it with the installed cuda-python.
CALLS = (
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuGraphGetNodes",
    "cuGraphGetEdges",
    "cuGraphNodeGetType",
    "cuGraphKernelNodeGetParams",
    "cuGraphMemsetNodeGetParams",
    "cuGraphMemcpyNodeGetParams",
    "cuGraphChildGraphNodeGetGraph",
    "cuGraphAddMemsetNode",
    "cuGraphAddDependencies",
    "cuGraphUpload",
    "cuFuncGetName",
    "cuKernelGetName",
    "cuPointerGetAttribute",
    "cuGetErrorString",
)

_KINDS = {
    "CU_GRAPH_NODE_TYPE_KERNEL": gn.KERNEL,
    "CU_GRAPH_NODE_TYPE_MEMCPY": gn.MEMCPY,
    "CU_GRAPH_NODE_TYPE_MEMSET": gn.MEMSET,
    "CU_GRAPH_NODE_TYPE_HOST": gn.HOST,
    "CU_GRAPH_NODE_TYPE_GRAPH": gn.CHILD,
    "CU_GRAPH_NODE_TYPE_EMPTY": gn.EMPTY,
    "CU_GRAPH_NODE_TYPE_WAIT_EVENT": gn.WAIT_EVENT,
    "CU_GRAPH_NODE_TYPE_EVENT_RECORD": gn.RECORD_EVENT,
    "CU_GRAPH_NODE_TYPE_MEM_ALLOC": gn.MEM_ALLOC,
    "CU_GRAPH_NODE_TYPE_MEM_FREE": gn.MEM_FREE,
    "CU_GRAPH_NODE_TYPE_CONDITIONAL": gn.CONDITIONAL,
}
_MEMORY = {1: "host", 2: "device", 3: "array"}
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the pointer says where it points


def bindings() -> Any:
    """The module `cuda.bindings.driver`. Raises BuildError where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BuildError(
            f"cuda-python is missing ({error}); graphs on CUDA need it: pip install "
            "'cuda-bindings>=13,<14'"
        ) from error


def call(name: str, *args: Any) -> Any:
    """Call the driver; returns its results (one, or a tuple). Raises CudaError."""
    driver = bindings()
    function = getattr(driver, name, None)
    if function is None:
        raise BuildError(
            f"cuda-python {driver.__name__} has no {name}; install 'cuda-bindings>=13,<14'"
        )
    status, *results = function(*args)
    if int(status) != 0:
        text = driver.cuGetErrorString(status)[1]
        reason = text.decode() if isinstance(text, bytes) else str(status)
        raise CudaError(f"{name} failed with {int(status)}: {reason}")
    return results[0] if len(results) == 1 else tuple(results)


def graph_handle(address: int) -> Any:
    """A CUgraph from the integer that torch's `raw_cuda_graph()` returns."""
    return bindings().CUgraph(address)


def read_graph(graph: Any) -> GraphInfo:
    """Walk a CUgraph and its child graphs."""
    nodes: list[NodeInfo] = []
    edges: list[Edge] = []
    _walk(graph, -1, nodes, edges)
    return GraphInfo(tuple(nodes), tuple(edges))


def list_nodes(graph: Any) -> list[Any]:
    """The CUgraphNode handles of one graph level, in the order that `read_graph` numbers them."""
    _, count = call("cuGraphGetNodes", graph, 0)
    return list(call("cuGraphGetNodes", graph, count)[0][:count]) if count else []


def add_reset(graph: Any, before: list[Any], address: int, num_bytes: int, device: int) -> None:
    """Add a root memset node that zeroes local memory, ahead of the nodes `before`."""
    driver = bindings()
    params = driver.CUDA_MEMSET_NODE_PARAMS()
    params.dst = driver.CUdeviceptr(address)
    params.pitch = 0
    params.value = 0
    params.elementSize = 4
    params.width = num_bytes // 4
    params.height = 1
    context = call("cuDevicePrimaryCtxRetain", driver.CUdevice(device))
    try:
        node = call("cuGraphAddMemsetNode", graph, [], 0, params, context)
        # No edge data: full edges.
        call("cuGraphAddDependencies", graph, [node] * len(before), before, None, len(before))
    finally:
        call("cuDevicePrimaryCtxRelease", driver.CUdevice(device))


def upload(executable: int, stream: int) -> None:
    """Copy an instantiated graph to the device, so that its first launch is not slower."""
    driver = bindings()
    call("cuGraphUpload", driver.CUgraphExec(executable), driver.CUstream(stream))


def _walk(graph: Any, parent: int, nodes: list[NodeInfo], edges: list[Edge]) -> None:
    handles = list_nodes(graph)
    index_of: dict[int, int] = {}
    children: list[tuple[int, Any]] = []
    for handle in handles:
        index = len(nodes)
        index_of[int(handle)] = index
        info = _read_node(handle, index, parent)
        nodes.append(info)
        if info.kind == gn.CHILD:
            children.append((index, call("cuGraphChildGraphNodeGetGraph", handle)))
    edges.extend(_read_edges(graph, index_of))
    for index, child in children:
        _walk(child, index, nodes, edges)


def _read_edges(graph: Any, index_of: dict[int, int]) -> list[Edge]:
    *_, count = call("cuGraphGetEdges", graph, 0)
    if not count:
        return []
    before, after, data, _ = call("cuGraphGetEdges", graph, count)
    return [
        Edge(index_of[int(b)], index_of[int(a)], _number(d.type) == 1)
        for b, a, d in zip(before[:count], after[:count], data[:count], strict=True)
    ]


def _read_node(handle: Any, index: int, parent: int) -> NodeInfo:
    node_type = call("cuGraphNodeGetType", handle)
    kind = _KINDS.get(node_type.name, node_type.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower())
    if kind == gn.KERNEL:
        return NodeInfo(index, kind, name=_kernel_name(handle), parent=parent)
    if kind == gn.MEMSET:
        p = call("cuGraphMemsetNodeGetParams", handle)
        rows = max(int(p.height), 1)
        row_bytes = int(p.width) * int(p.elementSize)
        extent = int(p.pitch) * (rows - 1) + row_bytes
        return NodeInfo(
            index, kind, parent=parent, address=int(p.dst), num_bytes=extent, value=int(p.value)
        )
    if kind == gn.MEMCPY:
        p = call("cuGraphMemcpyNodeGetParams", handle)
        size = int(p.WidthInBytes) * max(int(p.Height), 1) * max(int(p.Depth), 1)
        source = _memory(int(p.srcMemoryType), p.srcDevice)
        target = _memory(int(p.dstMemoryType), p.dstDevice)
        return NodeInfo(index, kind, parent=parent, num_bytes=size, source=source, target=target)
    return NodeInfo(index, kind, parent=parent)


def _kernel_name(handle: Any) -> str:
    params = call("cuGraphKernelNodeGetParams", handle)
    if int(params.func):
        name = call("cuFuncGetName", params.func)
    else:
        name = call("cuKernelGetName", params.kern)
    return gn.readable_name(name.decode() if isinstance(name, bytes) else str(name))


def _memory(kind: int, pointer: Any) -> str:
    if kind != _UNIFIED:
        return _MEMORY.get(kind, f"memory type {kind}")
    driver = bindings()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    status, value = driver.cuPointerGetAttribute(attribute, pointer)
    if int(status) != 0:
        return "host"  # CUDA does not know the pointer: pageable memory
    return _MEMORY.get(int(value), f"memory type {int(value)}")


def _number(value: Any) -> int:
    # A C char is an int or a byte, depending on the version of cuda-python.
    return value[0] if isinstance(value, bytes) else int(value)
