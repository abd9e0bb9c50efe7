"""Sizes of a normal buffer, which every rank of the group must share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ep_runtime import __version__
from ep_runtime.errors import ConfigError
from ep_runtime.native import _C
from ep_runtime.normal.heap import HeapSizes
from ep_runtime.normal.validate import MAX_ROW_BYTES, MAX_TOKENS, ROW_MULTIPLE

HEAP_STEP = 2 << 20  # data heaps grow by whole pages of a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalConfig:
    """Sizes that a NormalBuffer is built for. Checked when built; raises ConfigError.

    max_tokens   most tokens per rank in worst-case mode; in exact mode more make the heap grow
    max_hidden   channels of a BF16 row; longer rows make the heap grow
    max_experts  routed experts over all ranks
    max_topk     entries per token in topk_idx
    pool_bytes   where received tensors live; None: two dispatches of max_tokens from every rank
    """

    max_tokens: int
    max_hidden: int = 7168
    max_experts: int = 1024
    max_topk: int = 32
    pool_bytes: int | None = None

    def __post_init__(self) -> None:
        limits = _C.limits()
        _check("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check("max_hidden", self.max_hidden, ROW_MULTIPLE // 2, MAX_ROW_BYTES // 2)
        _check("max_experts", self.max_experts, 1, limits["max_experts"])
        _check("max_topk", self.max_topk, 1, limits["max_topk"])
        if self.pool_bytes is not None:
            _check("pool_bytes", self.pool_bytes, 0, 1 << 44)

    def validate_for(self, num_ranks: int) -> None:
        """Raise ConfigError unless a group of `num_ranks` ranks can use this configuration."""
        _check("num_ranks", num_ranks, 1, _C.limits()["max_ranks"])
        if self.max_experts < num_ranks:
            raise ConfigError(
                f"max_experts={self.max_experts} for num_ranks={num_ranks}: every rank owns an"
                " expert; give at least one per rank"
            )

    def heap_sizes(self, num_ranks: int) -> HeapSizes:
        """The parts of the data heap. FP8 rows with their scales take no more than BF16 rows."""
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
