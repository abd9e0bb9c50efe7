"""Decode steps as pre-sized graphs: buckets, capture, reset nodes, audit, replay."""

from ep_runtime.graphs.audit import Audit, Region, audit_graph, audit_operations
from ep_runtime.graphs.buckets import Buckets
from ep_runtime.graphs.build import GraphReport
from ep_runtime.graphs.decode import DecodeGraphs
from ep_runtime.graphs.nodes import Edge, GraphInfo, NodeInfo

__all__ = [
    "Audit",
    "Buckets",
    "DecodeGraphs",
    "Edge",
    "GraphInfo",
    "GraphReport",
    "NodeInfo",
    "Region",
    "audit_graph",
    "audit_operations",
]
