"""What the normal operations return.

R ranks, E experts, L = E/R local experts, T tokens of this rank, K top-k, N received rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this rank's tokens go. Tensors on the buffer's device.

    tokens_per_rank    int32 [R]: tokens that go to each rank, each counted once per rank
    tokens_per_expert  int32 [E]: entries of topk_idx that name the expert
    is_token_in_rank   bool [T, R]
    """

    tokens_per_rank: torch.Tensor
    tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RailTables:
    """Where tokens go over a rail: the ranks of one number on all N nodes.

    prefix       int32 [N, N]: [m, n] is the number of tokens from the rail's ranks on nodes 0 .. m
                 to that on node n
    position     int32 [T, N]: the token's index among this rank's tokens to that node, or -1
    out_prefix, home_prefix, home_order   of rails by puts: see csrc/ep/wire.h
    """

    prefix: torch.Tensor
    position: torch.Tensor
    out_prefix: torch.Tensor | None
    home_prefix: torch.Tensor | None
    home_order: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class NodeRouting:
    """What a handle holds besides where there are nodes: N of them, with G ranks each.

    node, local    this rank's
    rail           where tokens go over this rank's rail
    rail_rows      V, tokens that this rank got over it
    rail_inbox_rows                   most that a combine brings home over the rail
    node_prefix, node_position        int32 [G, G], [V, G]: the rail rows as a group of the node
                                      sends them: see NormalHandle
    node_inbox_rows                   most that a combine brings home within the node
    reach, target  int32 [G, G], [V, G]: the same with target rows for positions, see ep/nodes.h
    order          int32 [N]: this rank's received rows by the node's rank that sent them
    """

    node: int
    local: int
    rail: RailTables
    rail_rows: int
    rail_inbox_rows: int
    node_prefix: torch.Tensor
    node_position: torch.Tensor
    node_inbox_rows: int
    reach: torch.Tensor
    target: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NormalHandle:
    """A routing: what combine() and dispatch_cached() need. Good any number of times.

    rank_prefix       int32 [R, R]: [s, d] is the number of tokens from ranks 0 .. s to rank d
    send_position     int32 [T, R]: the token's index among this rank's tokens to that rank, or -1
    is_token_in_rank  bool [T, R]
    num_tokens        T
    num_rows          N
    most_rows         most rows that any rank receives
    inbox_rows        most rows that a combine brings home on any rank
    num_experts       E
    exact             every row was sent by somebody; else rows after the last one are padding
    owner             identity of the NormalBuffer
    nodes             the way through rails and nodes; None where there are none
    """

    rank_prefix: torch.Tensor
    send_position: torch.Tensor
    is_token_in_rank: torch.Tensor
    num_tokens: int
    num_rows: int
    most_rows: int
    inbox_rows: int
    num_experts: int
    exact: bool
    owner: object
    nodes: NodeRouting | None = None


@dataclass(frozen=True, slots=True)
class NormalReceived:
    """Rows that other ranks (and this one) sent here: by source rank, then token.

    Memory of x is reused when x and its views are dropped; scales, topk_idx, topk_weights and
    source_token share another piece, which is reused when the last of them is. Where the pool had
    no room (or is none: pool_bytes=0), each is an ordinary tensor. Worst-case mode: what lies in
    rows that nobody sent is undefined, but for topk_idx (-1) and topk_weights (0).

    x                [N, H], the dtype that was sent
    scales           [N, G] (or [N]) as sent, contiguous; None without
    topk_idx         int64 [N, K]: local expert, or -1; None if none were sent
    topk_weights     float32 [N, K], 0 where topk_idx is -1; None if none were sent
    source_token     int32 [N]: the row's index at its source
    recv_per_expert  rows per local expert, each rounded up to expert_alignment: a list in exact
                     mode, empty in worst-case mode and after dispatch_cached()
    recv_counts      int32 [L] on the device: the same; None after dispatch_cached()
    handle           what combine() and dispatch_cached() take
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    source_token: torch.Tensor
    recv_per_expert: list[int]
    recv_counts: torch.Tensor | None
    handle: NormalHandle


@dataclass(slots=True)
class NormalStats:
    """Counted on the host since construction.

    dispatches         calls, cached ones included
    combines           calls
    copied_dispatches  dispatches for which the pool had no room: received into the staging block
                       and copied to ordinary tensors
    growths            times the data heap was replaced by a larger one
    """

    dispatches: int = 0
    combines: int = 0
    copied_dispatches: int = 0
    growths: int = 0
