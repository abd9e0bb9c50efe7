"""Sizes of a normal buffer, which every rank of the group must share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from ep_runtime import __version__
from ep_runtime.errors import ConfigError
from ep_runtime.native import _C
from ep_runtime.normal.heap import HeapSizes
from ep_runtime.normal.validate import MAX_ROW_BYTES, MAX_TOKENS, ROW_MULTIPLE

HEAP_STEP = 2 << 20  # data heaps grow by whole pages of a GPU

BetweenNodes = Literal["auto", "direct", "nvshmem", "puts", "flat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalConfig:
    """Sizes that a NormalBuffer is built for. Checked when built; raises ConfigError.

    max_tokens   most tokens per rank in worst-case mode; in exact mode more make the heap grow
    max_hidden   channels of a BF16 row; longer rows make the heap grow
    max_experts  routed experts over all ranks
    max_topk     entries per token in topk_idx
    pool_bytes   where received tensors live; None: two dispatches of max_tokens from every rank
    ranks_per_node  ranks 0 .. n-1 are a node, n .. 2n-1 the next; None: nobody asks for nodes.
                 Where there is more than one node, a rank dispatches at most max_tokens tokens
    between_nodes   how rows get from node to node: once per node, over memory that both sides map
                 ("direct") or by NVSHMEM's puts ("nvshmem"). For tests: once per node, by puts as
                 NVSHMEM's, which copy over mapped memory ("puts"); once per rank ("flat")
    """

    max_tokens: int
    max_hidden: int = 7168
    max_experts: int = 1024
    max_topk: int = 32
    pool_bytes: int | None = None
    ranks_per_node: int | None = None
    between_nodes: BetweenNodes = "auto"

    def __post_init__(self) -> None:
        limits = _C.limits()
        _check("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check("max_hidden", self.max_hidden, ROW_MULTIPLE // 2, MAX_ROW_BYTES // 2)
        _check("max_experts", self.max_experts, 1, limits["max_experts"])
        _check("max_topk", self.max_topk, 1, limits["max_topk"])
        if self.pool_bytes is not None:
            _check("pool_bytes", self.pool_bytes, 0, 1 << 44)
        if self.ranks_per_node is not None:
            _check("ranks_per_node", self.ranks_per_node, 1, limits["max_ranks"])
        if self.between_nodes not in get_args(BetweenNodes):
            raise ConfigError(
                f"between_nodes={self.between_nodes!r}: it must be one of {get_args(BetweenNodes)}"
            )

    def validate_for(self, num_ranks: int) -> None:
        """Raise ConfigError unless a group of `num_ranks` ranks can use this configuration."""
        _check("num_ranks", num_ranks, 1, _C.limits()["max_ranks"])
        if self.max_experts < num_ranks:
            raise ConfigError(
                f"max_experts={self.max_experts} for num_ranks={num_ranks}: every rank owns an"
                " expert; give at least one per rank"
            )

        if self.ranks_per_node is None:
            if self.between_nodes != "auto":
                raise ConfigError(
                    f"between_nodes={self.between_nodes!r} without ranks_per_node: say how many"
                    " ranks a node has"
                )
            return
        if num_ranks % self.ranks_per_node:
            raise ConfigError(
                f"ranks_per_node={self.ranks_per_node} for num_ranks={num_ranks}: all nodes have"
                " the same number of ranks; give a divisor of num_ranks"
            )
        nodes = num_ranks // self.ranks_per_node
        if nodes * self.max_tokens > MAX_TOKENS:
            raise ConfigError(
                f"max_tokens={self.max_tokens} on {nodes} nodes: their product must be at most"
                f" {MAX_TOKENS}; lower max_tokens"
            )

    def num_nodes(self, num_ranks: int) -> int:
        """Nodes of the group; 1 where none were declared."""
        return 1 if self.ranks_per_node is None else num_ranks // self.ranks_per_node

    def layered(self, num_ranks: int) -> bool:
        """Rows go from node to node, and then from rank to rank."""
        return self.num_nodes(num_ranks) > 1 and self.between_nodes != "flat"

    @property
    def wired(self) -> bool:
        """Rows get from node to node by puts."""
        return self.between_nodes in ("nvshmem", "puts")

    def heap_sizes(self, num_ranks: int) -> HeapSizes:
        """The parts of the data heap. FP8 rows with their scales take no more than BF16 rows."""
        if self.layered(num_ranks):
            return HeapSizes(0, 0, 1)  # rows go through the heaps of its rail and its node
        row = 2 * self.max_hidden
        staging = block_bytes(num_ranks * self.max_tokens, row, 0, self.max_topk)
        inbox = inbox_bytes((num_ranks - 1) * self.max_tokens, self.max_hidden, self.max_topk)
        pool = 2 * staging if self.pool_bytes is None else self.pool_bytes
        return HeapSizes(staging, inbox, pool)

    def fields(self, num_ranks: int) -> dict[str, object]:
        """Everything that ranks must share, by name."""
        return {**asdict(self), "num_ranks": num_ranks, "package": __version__}

    def fingerprint(self, num_ranks: int) -> str:
        """The same on two ranks exactly when they can form a group."""
        text = json.dumps(self.fields(num_ranks), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def block_bytes(rows: int, row_bytes: int, num_scales: int, topk: int) -> int:
    """Receive memory of a dispatch."""
    return _C.normal_block(rows, row_bytes, num_scales, topk)["bytes"]


def inbox_bytes(rows: int, hidden: int, topk: int) -> int:
    """Where a combine's rows come home."""
    return _C.normal_inbox(rows, hidden, topk)["bytes"]


def _check(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{name}={value!r}: it must be an integer from {low} to {high}; build the NormalBuffer"
            f" with a {name} in that range"
        )
