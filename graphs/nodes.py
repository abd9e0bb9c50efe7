"""A graph as plain data, and the questions asked of it. No CUDA here: all of it runs anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KERNEL = "kernel"
MEMCPY = "memcpy"
MEMSET = "memset"
HOST = "host"
CHILD = "child graph"
EMPTY = "empty"
WAIT_EVENT = "event wait"
RECORD_EVENT = "event record"
MEM_ALLOC = "memory allocation"
MEM_FREE = "memory free"
CONDITIONAL = "conditional"

OUR_NAMESPACE = "ep::"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node. Fields that its kind has not are at their defaults.

    `index` counts over the whole walk, child graphs included; `parent` is the index of the child
    graph node that holds this one, or -1. Memset: [address, address + num_bytes) is set to `value`.
    Memcpy: `source` and `target` are "host", "device" or "array".
    """

    index: int
    kind: str
    name: str = ""
    parent: int = -1
    address: int = 0
    num_bytes: int = 0
    value: int = 0
    source: str = ""
    target: str = ""

    @property
    def ours(self) -> bool:
        """A kernel of this package: one in C++ namespace `ep`."""
        return self.kind == KERNEL and self.name.startswith(OUR_NAMESPACE)

    def __str__(self) -> str:
        inside = f" in child graph {self.parent}" if self.parent >= 0 else ""
        return f"node {self.index} ({self.describe()}){inside}"

    def describe(self) -> str:
        if self.kind == MEMSET:
            return f"{MEMSET} of {self.num_bytes} bytes at {self.address:#x} to {self.value}"
        if self.kind == MEMCPY:
            return f"{MEMCPY} {self.source} to {self.target}, {self.num_bytes} bytes"
        return f"{self.kind} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class Edge:
    """`after` starts when `before` ends, or, if programmatic, when it allows it."""

    before: int
    after: int
    programmatic: bool = False


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """A walked graph. Edges join nodes of the same (child) graph."""

    nodes: tuple[NodeInfo, ...]
    edges: tuple[Edge, ...]

    def entries(self, parent: int = -1) -> list[NodeInfo]:
        return [node for node in self.nodes if node.parent == parent]


def readable_name(symbol: str) -> str:
    """A kernel's qualified name without arguments: `_ZN2ep4cuda4sendEPv` -> `ep::cuda::send`.

    Reads the nested and plain names of the Itanium C++ mangling; what it cannot read it returns
    as it came. Template arguments are dropped, unnamed namespaces too.
    """
    if not symbol.startswith("_Z"):
        return symbol
    rest = symbol[2:]
    rest = rest.removeprefix("L")
    nested = rest.startswith("N")
    rest = rest[1:].lstrip("rVKL") if nested else rest
    parts: list[str] = []
    while rest and rest[0].isdigit():
        digits = len(rest) - len(rest.lstrip("0123456789"))
        length = int(rest[:digits])
        part, rest = rest[digits : digits + length], rest[digits + length :]
        if len(part) < length:
            return symbol
        if not part.startswith("_GLOBAL__N_"):
            parts.append(part)
        rest = rest.removeprefix("L")
        if not nested:
            break
    return "::".join(parts) or symbol


def reaches(edges: Iterable[Edge], start: int) -> set[int]:
    """Every node that runs after `start` because of the edges."""
    followers: dict[int, list[int]] = {}
    for edge in edges:
        followers.setdefault(edge.before, []).append(edge.after)
    seen: set[int] = set()
    stack = [start]
    while stack:
        for node in followers.get(stack.pop(), ()):
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def first_kernels(nodes: Sequence[NodeInfo], edges: Sequence[Edge]) -> list[int]:
    """Indices of our kernels that no other of our kernels precedes: one per branch of the graph.

    A child graph that holds one of our kernels counts as our kernel in its parent's graph.
    """
    holders = {node.parent for node in nodes if node.ours}
    ours = [n.index for n in nodes if n.parent == -1 and (n.ours or n.index in holders)]
    preceded: set[int] = set()
    for index in ours:
        if index not in preceded:
            preceded |= reaches(edges, index)
    return [index for index in ours if index not in preceded]


def reset_anchors(nodes: Sequence[NodeInfo], edges: Sequence[Edge]) -> list[int]:
    """Where reset nodes are joined so that they precede every kernel of ours.

    A kernel that starts under its predecessor (a programmatic edge) keeps that as its only edge:
    the reset is joined to the predecessor, and so on back to a node that starts by full edges.
    """
    starts_under = {edge.after: edge.before for edge in edges if edge.programmatic}
    anchors = []
    for index in first_kernels(nodes, edges):
        anchor = index
        while anchor in starts_under:
            anchor = starts_under[anchor]
        anchors.append(anchor)
    return sorted(set(anchors))
