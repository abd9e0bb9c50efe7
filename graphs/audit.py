"""What a captured graph does, and whether it may be replayed.

A graph that a group of ranks replays must not allocate, call the host, or copy to it: each stalls
the rank while its peers spin. `audit_graph` judges a walked CUDA graph, `audit_operations` what the
host backend recorded; both return an `Audit`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ep_runtime.errors import CaptureError
from ep_runtime.graphs import nodes as gn
from ep_runtime.graphs.nodes import GraphInfo, NodeInfo

_LAUNCHES = (gn.KERNEL, gn.MEMCPY, gn.MEMSET)
_REMEDY = {
    gn.MEM_ALLOC: "allocate before the capture (static inputs, torch's graph pool)",
    gn.MEM_FREE: "free after the graph is dropped, not inside it",
    gn.HOST: "take the callback out of the step; do it after replay()",
}


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [address, address + num_bytes) of one device; `label` says whose."""

    address: int
    num_bytes: int
    device: int = 0
    label: str = ""

    def holds(self, address: int, num_bytes: int) -> bool:
        return self.address <= address and address + num_bytes <= self.address + self.num_bytes

    def touches(self, address: int, num_bytes: int) -> bool:
        return address < self.address + self.num_bytes and self.address < address + num_bytes


@dataclass(frozen=True, slots=True)
class Audit:
    """Facts about one graph.

    counts: nodes by kind (host backend: operations by kind). kernels: launches by kernel name.
    resets: the memset nodes that zero step statistics. problems: why it may not be replayed.
    notes: what is allowed but worth knowing. graph: the walked graph (None on the host backend).
    operations: "dispatch_send chain 0 rank 1" and so on, in order of issue.
    """

    counts: dict[str, int]
    kernels: dict[str, int]
    resets: tuple[NodeInfo, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    operations: tuple[str, ...]
    graph: GraphInfo | None = None

    @property
    def launches(self) -> int:
        """Kernels, copies and memsets: what the device executes in one replay."""
        if self.graph is None:
            return len(self.operations)
        return sum(self.counts.get(kind, 0) for kind in _LAUNCHES)

    @property
    def our_kernels(self) -> dict[str, int]:
        return {k: c for k, c in self.kernels.items() if k.startswith(gn.OUR_NAMESPACE)}

    @property
    def programmatic_edges(self) -> int:
        return 0 if self.graph is None else sum(e.programmatic for e in self.graph.edges)

    def require_clean(self, what: str) -> None:
        """Raise CaptureError with every problem, if there is one."""
        if self.problems:
            raise CaptureError(f"{what} may not be replayed: " + "; ".join(self.problems))

    def to_text(self) -> str:
        """A few aligned lines for people."""
        lines = [f"{kind:>18}  {count}" for kind, count in sorted(self.counts.items())]
        lines += [f"{'launches':>18}  {self.launches}"]
        lines += [f"{'kernel':>18}  {c} x {k}" for k, c in sorted(self.kernels.items())]
        lines += [f"{'reset':>18}  {node.describe()}" for node in self.resets]
        lines += [f"{'note':>18}  {text}" for text in self.notes]
        lines += [f"{'problem':>18}  {text}" for text in self.problems]
        return "\n".join(lines)

    def to_dot(self) -> str:
        """The graph in DOT: our kernels filled, resets as hexagons, programmatic edges dashed."""
        if self.graph is None:
            return _dot_chain(self.operations)
        return _dot_graph(self.graph, {node.index for node in self.resets})


def audit_graph(
    graph: GraphInfo,
    *,
    resets: Sequence[Region] = (),
    shared: Sequence[Region] = (),
    operations: Iterable[str] = (),
) -> Audit:
    """Judge a walked CUDA graph.

    resets: memory that must be zeroed, each by one memset node ahead of every kernel of ours.
    shared: memory that peers write; a memset there is a race and is reported.
    """
    counts = Counter(node.kind for node in graph.nodes)
    kernels = Counter(node.name for node in graph.nodes if node.kind == gn.KERNEL)
    reset_nodes = tuple(
        node
        for node in graph.nodes
        if node.kind == gn.MEMSET and any(r.holds(node.address, node.num_bytes) for r in resets)
    )
    problems = [text for node in graph.nodes for text in _node_problems(node, shared)]
    problems += _reset_problems(graph, reset_nodes, resets)
    return Audit(
        counts=dict(counts),
        kernels=dict(kernels),
        resets=reset_nodes,
        problems=tuple(problems),
        notes=tuple(text for node in graph.nodes for text in _node_notes(node)),
        operations=tuple(operations),
        graph=graph,
    )


def audit_operations(operations: Sequence[str], resets: Sequence[Region] = ()) -> Audit:
    """Facts about what the host backend recorded: operations in order, after the resets."""
    return Audit(
        counts=dict(Counter(text.split()[0] for text in operations)),
        kernels={},
        resets=tuple(
            NodeInfo(i, gn.MEMSET, address=region.address, num_bytes=region.num_bytes)
            for i, region in enumerate(resets)
        ),
        problems=(),
        notes=(),
        operations=tuple(operations),
    )


def _node_problems(node: NodeInfo, shared: Sequence[Region]) -> list[str]:
    if node.kind in _REMEDY:
        return [f"{node} is not allowed: {_REMEDY[node.kind]}"]
    if node.kind == gn.MEMCPY and node.target == "host":
        return [
            f"{node} copies to the host: keep the value on the device and read it after replay() "
            "(.item(), .cpu() and .tolist() do this)"
        ]
    if node.kind == gn.MEMSET:
        return [
            f"{node} clears memory that peers write ({region.label}): a race; only local memory "
            "may be reset"
            for region in shared
            if region.touches(node.address, node.num_bytes)
        ]
    return []


def _node_notes(node: NodeInfo) -> list[str]:
    if node.kind == gn.MEMCPY and node.source == "host":
        return [f"{node} reads host memory as it is at each replay, not as it was at capture"]
    if node.kind == gn.CONDITIONAL:
        return [f"{node}: its body is not walked; every rank must take the same branch"]
    return []


def _reset_problems(
    graph: GraphInfo, found: Sequence[NodeInfo], wanted: Sequence[Region]
) -> list[str]:
    first = set(gn.first_kernels(graph.nodes, graph.edges))
    problems = []
    for region in wanted:
        exact = [n for n in found if (n.address, n.num_bytes) == (region.address, region.num_bytes)]
        where = f"{region.num_bytes} bytes at {region.address:#x} ({region.label})"
        if len(exact) != 1 or exact[0].value != 0:
            problems.append(
                f"{len(exact)} memset nodes reset {where}, wanted one to 0; capture again"
            )
            continue
        late = first - gn.reaches(graph.edges, exact[0].index)
        if late:
            problems.append(
                f"the reset of {where} is not ordered before our kernel nodes {sorted(late)}; "
                "capture again"
            )
    return problems


def _dot_graph(graph: GraphInfo, resets: set[int]) -> str:
    lines = ["digraph step {", '  node [shape=box, fontname="monospace"];']
    for node in graph.nodes:
        style = ""
        if node.index in resets:
            style = ", shape=hexagon"
        elif node.ours:
            style = ', style=filled, fillcolor="lightblue"'
        lines.append(f"  n{node.index} [label={_quote(node.describe())}{style}];")
        if node.parent >= 0:
            lines.append(f"  n{node.parent} -> n{node.index} [style=dotted, arrowhead=none];")
    for edge in graph.edges:
        style = " [style=dashed]" if edge.programmatic else ""
        lines.append(f"  n{edge.before} -> n{edge.after}{style};")
    return "\n".join([*lines, "}", ""])


def _dot_chain(operations: Sequence[str]) -> str:
    lines = ["digraph step {", '  node [shape=box, fontname="monospace"];']
    lines += [f"  n{i} [label={_quote(text)}];" for i, text in enumerate(operations)]
    lines += [f"  n{i} -> n{i + 1};" for i in range(len(operations) - 1)]
    return "\n".join([*lines, "}", ""])


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
