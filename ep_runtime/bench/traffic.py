"""How many bytes the link must carry, by a formula that no implementation can beat or bend.

A token has to reach each *other* rank that owns one of its experts once, and one reduced row has to
come back from each of them (per-rank deduplication). With m[s][d] tokens of rank s that choose an
expert of rank d:

    messages = max over ranks r of max(sum of m[r][d] over d != r, sum of m[s][r] over s != r)
    dispatch = messages * bytes of a row on the wire (H + 4 H / 128 for fp8, 2 H for bf16)
    combine  = messages * bytes of a row (2 H, but where an fp8 combine is measured)

The link is full duplex, so the busier direction of the busiest rank sets the time. Headers, tags
and padding are an implementation's own and are not counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_runtime.errors import ConfigError
from ep_runtime.reference import SCALE_GROUP

BF16_BYTES = 2
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes in the busier direction of the busiest rank."""

    dispatch: float
    combine: float

    def of(self, op: str) -> float:
        """Bytes of "dispatch", "combine" or their sum ("pair")."""
        parts = {"dispatch": self.dispatch, "combine": self.combine}
        parts["pair"] = self.dispatch + self.combine
        if op not in parts:
            raise ConfigError(f"op={op!r} carries no bytes; use one of {', '.join(parts)}")
        return parts[op]

    @classmethod
    def mean(cls, many: Sequence[Traffic]) -> Traffic:
        """The average over input sets."""
        return cls(
            sum(one.dispatch for one in many) / len(many),
            sum(one.combine for one in many) / len(many),
        )


def row_bytes(row_format: str, hidden: int) -> int:
    """Bytes of one row and its scales on the wire."""
    if row_format == "fp8":
        return hidden + hidden // SCALE_GROUP * SCALE_BYTES
    return hidden * BF16_BYTES


def message_counts(routes: Sequence[torch.Tensor], num_experts: int) -> torch.Tensor:
    """m [R, R] int64: tokens of rank s that choose at least one expert of rank d.

    `routes[s]` is the topk_idx [T, K] of rank s; entries below zero choose nothing.
    """
    num_ranks = len(routes)
    owners = num_experts // num_ranks
    counts = torch.zeros(num_ranks, num_ranks, dtype=torch.int64)
    for source, idx in enumerate(routes):
        for dest in range(num_ranks):
            there = (idx >= dest * owners) & (idx < (dest + 1) * owners)
            counts[source, dest] = there.any(dim=-1).sum()
    return counts


def busiest_direction(counts: torch.Tensor) -> int:
    """Messages through the busier direction of the busiest rank's link."""
    remote = counts - torch.diag(torch.diag(counts))
    return int(torch.maximum(remote.sum(dim=1), remote.sum(dim=0)).max())


def least_traffic(
    counts: torch.Tensor, dispatch_format: str, combine_format: str, hidden: int
) -> Traffic:
    """The formula at the top of this file for m = `counts`."""
    messages = busiest_direction(counts)
    return Traffic(
        messages * row_bytes(dispatch_format, hidden), messages * row_bytes(combine_format, hidden)
    )


def time_at(num_bytes: float, link_gbs: float) -> float:
    """Microseconds that `num_bytes` take at `link_gbs` (1e9 bytes per second)."""
    return num_bytes / link_gbs / 1e3
