"""Groups with nodes, beside the flat group that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from expect import bits
from programs import POISON
from ranks import Group, Place

from ep_runtime.native import _C
from ep_runtime.normal import NormalBuffer, NormalHandle, reference
from ep_runtime.normal.handles import NodeRouting
from ep_runtime.normal.reference import ExpectedRows, RankTokens


@dataclass(frozen=True)
class NodePlace:
    """`place`, whose ranks are declared nodes of ranks_per_node each."""

    place: Place
    ranks_per_node: int
    between: str = "direct"

    @property
    def name(self) -> str:
        return f"{self.place.name}-as-{self.num_nodes}-nodes-{self.between}"

    @property
    def num_ranks(self) -> int:
        return self.place.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.place.num_ranks // self.ranks_per_node


@dataclass(frozen=True)
class Pair:
    """The same ranks twice: rows cross once per node, or once per rank."""

    layered: Group
    flat: Group

    def both(self, program: Any, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Results of `program`, by rank, after checking that both groups gave the same."""
        ours = self.layered.run(program, arguments)
        theirs = self.flat.run(program, arguments)
        for rank, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"rank {rank}")
        return ours


def assert_same(mine: Any, other: Any, where: str) -> None:
    """Equal, tensors bit for bit."""
    assert type(mine) is type(other), where
    if isinstance(mine, torch.Tensor):
        assert mine.shape == other.shape, where
        assert torch.equal(bits(mine), bits(other)), where
    elif isinstance(mine, tuple | list):
        assert len(mine) == len(other), where
        for index, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys(), where
        for key in mine:
            assert_same(mine[key], other[key], f"{where}[{key}]")
    elif hasattr(mine, "__dataclass_fields__"):
        assert_same(vars(mine), vars(other), where)
    else:
        assert mine == other, where


def sum_by_nodes(
    rows: Sequence[torch.Tensor],
    expected: Sequence[ExpectedRows],
    num_tokens: Sequence[int],
    ranks_per_node: int,
    bias: Sequence[Sequence[torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """The definition, for rows (BF16) and weights (FP32) alike, of what combine returns."""
    width, dtype = rows[0].shape[1], rows[0].dtype
    total = [torch.zeros((tokens, width)) for tokens in num_tokens]
    for rank, biases in enumerate(bias or []):
        for one in biases:
            total[rank] = total[rank] + one.float()
    for first in range(0, len(rows), ranks_per_node):
        partial = [torch.zeros_like(one) for one in total]
        for rank in range(first, first + ranks_per_node):
            for row, (sender, token) in enumerate(expected[rank].source):
                partial[sender][token] = partial[sender][token] + rows[rank][row].float()
        total = [whole + part.to(dtype).float() for whole, part in zip(total, partial, strict=True)]
    return [one.to(dtype) for one in total]


def check_near(
    got: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    expected: Sequence[ExpectedRows],
    num_tokens: Sequence[int],
    bias: Sequence[Sequence[torch.Tensor]] | None = None,
) -> None:
    """Within the roundings of the definition of the FP64 sum."""
    sources = [one.source for one in expected]
    exact = reference.combine(rows, sources, num_tokens, bias)
    size = reference.combine([r.abs() for r in rows], sources, num_tokens, None)
    for rank, biases in enumerate(bias or []):
        for one in biases:
            size[rank] = size[rank] + one.double().abs()
    for rank, mine in enumerate(got):
        unit = 2.0**-8 if mine.dtype is torch.bfloat16 else 2.0**-22
        error = (mine.double() - exact[rank]).abs()
        assert (error <= 2.02 * unit * size[rank] + 1e-37).all(), f"rank {rank}"


def goes_to_node(
    inputs: Sequence[RankTokens], num_experts: int, num_nodes: int
) -> list[torch.Tensor]:
    """bool [T, N] of every rank."""
    per_node = num_experts // num_nodes
    return [
        torch.stack(
            [
                ((one.topk_idx >= n * per_node) & (one.topk_idx < (n + 1) * per_node)).any(1)
                for n in range(num_nodes)
            ],
            dim=1,
        )
        for one in inputs
    ]


# ---- programs -----------------------------------------------------------------------------------


def crossed(
    buffer: NormalBuffer, handle_of: Any, row_bytes: int, num_scales: int, topk: int
) -> tuple[int, torch.Tensor]:
    """(rail rows that this rank counted, uint8 [rows, row_bytes]: those in its rail's receive
    memory, behind which nothing was written since it was poisoned). Of an exact dispatch."""
    import programs

    routing: NodeRouting | None = programs.kept(buffer, handle_of).handle.nodes
    assert routing is not None
    counted = routing.rail_rows
    heap = buffer._parts[0]._heap
    memory = heap.view(0, heap.sizes.staging, None).cpu()
    begin = _C.normal_block(counted, row_bytes, num_scales, topk)["x"]
    end = begin + counted * row_bytes
    assert (memory[end:] == POISON).all()
    return counted, memory[begin:end].view(counted, row_bytes).clone()


def handle_tables(buffer: NormalBuffer) -> tuple[torch.Tensor, ...]:
    """Tables of the last handle that flat and layered groups share."""
    import programs

    handle: NormalHandle = programs.kept(buffer, "last").handle
    return (
        handle.rank_prefix.cpu(),
        handle.send_position.cpu(),
        handle.is_token_in_rank.cpu(),
        torch.tensor([handle.num_tokens, handle.num_rows, handle.most_rows, handle.num_experts]),
    )


def num_parts(buffer: NormalBuffer) -> int:
    return len(buffer._parts)
