"""What operations return besides bare tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class Handle:
    """What combines need to know of their dispatch. Made by Buffer; usable any number of times.

    It is good until the receive tensors of its dispatch are used again: those of the chain by the
    chain's next dispatch, others (`Buffer.new_receive`) by the next dispatch that is given them.
    `Buffer.reset()` ends all: what a dispatch before it left may be unfinished.

    owner            the Buffer's identity
    chain            the chain that the dispatch was on; its combines go there too
    num_rows         T of the dispatch: rows of the combine's output
    num_tokens       the dispatch's device scalar, or None where all T rows were real. Combines
                     read it again: it must keep its value until the last one has run
    expected_tokens  most tokens any rank sends (0: max_tokens); only sizes the launch
    late_weights     the dispatch had no topk_weights: every combine brings them
    routing          uint8: which token went where, which row came from where
    uses             the receive tensors' counter, and what it showed at the dispatch
    resets           the same for the Buffer's resets
    """

    owner: object
    chain: int
    num_rows: int
    num_tokens: torch.Tensor | None
    expected_tokens: int
    late_weights: bool
    routing: torch.Tensor
    uses: Uses
    use: int
    resets: Uses
    reset: int

    @property
    def stale(self) -> bool:
        """True if a later dispatch has used the same receive tensors, or after a reset()."""
        return self.uses.count != self.use or self.resets.count != self.reset


@dataclass(slots=True)
class Uses:
    """How many dispatches have used some receive tensors, or how often a Buffer was reset."""

    count: int = 0


@dataclass(slots=True, eq=False)
class Received:
    """Rows that this rank's experts got. The tensors last until they are used again (see Handle);
    where no row was received their content is undefined.

    R ranks, M max_tokens, L local experts, H hidden, K top-k.

    x              "batched" [L, R*M, H]: expert l's rows are x[l, :recv_count[l]];
                   "contiguous" [rows, H]: expert l's are x[expert_offset[l]:][:recv_count[l]];
                   "compact" [R*M, H]: one row per message, those of source 0 first, without gaps.
                   bf16, float8_e4m3fn, or uint8 [..., opaque_row_bytes]
    scales         float32 [..., H/128], value = x * scale; or int32 [..., ceil(H/512)], four UE8M0
                   exponents each (byte j is group 4*i + j); opaque: int32 [..., scale words].
                   None where rows have none. Any strides that new_receive was asked for
    recv_count     int32 [L]: rows of each local expert
    expert_offset  "contiguous" int32 [L+1]: multiples of the alignment; the last is the end
    topk_idx       "compact" int32 [R*M, K]: local expert; -1: another rank's, none, no row
    topk_weights   "compact" float32 [R*M, K]
    num_messages   int32 [R]: tokens received from each source
    source_token   "batched" int32 [L, R*M]: each row's token at its source
    layout_range   "batched" int64 [L, R]: (first row << 32) | rows, of each source
    handle         what combine takes
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    expert_offset: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_messages: torch.Tensor
    source_token: torch.Tensor | None
    layout_range: torch.Tensor | None
    handle: Handle


@dataclass(frozen=True, slots=True)
class StepStats:
    """Sums on one rank and chain since the last reset of its statistics.

    messages_sent      (token, rank) pairs sent, this rank included
    messages_received  the same, received
    rows_received      (message, local expert) pairs
    bytes_dispatched   payload bytes sent by dispatch
    bytes_combined     payload bytes sent back by combine
    wait_ns            nanoseconds until each source's counts came, in the last dispatch
    """

    messages_sent: int
    messages_received: int
    rows_received: int
    bytes_dispatched: int
    bytes_combined: int
    wait_ns: tuple[int, ...]
