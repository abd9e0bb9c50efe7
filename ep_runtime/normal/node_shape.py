"""Which ranks of a group form its nodes and its rails (nodes.py)."""

from __future__ import annotations

from dataclasses import dataclass

from ep_runtime.normal.config import NormalConfig


@dataclass(frozen=True, slots=True)
class NodeShape:
    """Where a rank stands among N nodes of G ranks."""

    num_nodes: int
    ranks_per_node: int
    rank: int

    @classmethod
    def of(cls, config: NormalConfig, num_ranks: int, rank: int) -> NodeShape:
        """The declared nodes, or one."""
        nodes = config.num_nodes(num_ranks)
        return cls(nodes, num_ranks // nodes, rank)

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local(self) -> int:
        return self.rank % self.ranks_per_node

    @property
    def rail_members(self) -> list[int]:
        return [n * self.ranks_per_node + self.local for n in range(self.num_nodes)]

    @property
    def node_members(self) -> list[int]:
        first = self.node * self.ranks_per_node
        return list(range(first, first + self.ranks_per_node))
