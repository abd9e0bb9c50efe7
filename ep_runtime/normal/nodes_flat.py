"""The sum of a group with nodes by flat operations: what layered ones are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ep_runtime.normal.ops import Tables


def sum_by_nodes(
    combine: Callable[[Tables, torch.Tensor, torch.Tensor | None], None],
    tables: Tables,
    ranks_per_node: int,
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """Fill `out` (and `weights`) with the biases and one sum per node, added up in this order.

    combine  adds up what comes back along tables that name the ranks of one node alone, in FP32 in
             rank order, into a BF16 tensor (and FP32 weights). Called once per node: the rows of
             different nodes come one after the other.
    Does not synchronise; capturable.
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    total_weights = None if weights is None else torch.zeros_like(weights)
    for bias in biases:
        total += bias.float()
    for first in range(0, tables.rank_prefix.shape[1], ranks_per_node):
        partial = torch.empty_like(out)
        partial_weights = None if weights is None else torch.empty_like(weights)
        combine(_ranks_alone(tables, first, first + ranks_per_node), partial, partial_weights)
        total += partial.float()
        if total_weights is not None and partial_weights is not None:
            total_weights += partial_weights
    out.copy_(total)
    if weights is not None and total_weights is not None:
        weights.copy_(total_weights)


def _ranks_alone(tables: Tables, first: int, end: int) -> Tables:
    """As if only ranks first .. end - 1 had received anything."""
    prefix = torch.zeros_like(tables.rank_prefix)
    position = torch.full_like(tables.send_position, -1)
    prefix[:, first:end] = tables.rank_prefix[:, first:end]
    position[:, first:end] = tables.send_position[:, first:end]
    return Tables(prefix, position)
