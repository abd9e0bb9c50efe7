"""What operations return besides bare tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_runtime.config import EpConfig
from ep_runtime.layout import FORMAT, SCALE_GROUP
from ep_runtime.native import _C


@dataclass(slots=True)
class Handle:
    """What a combine needs to know of its dispatch. Made by Buffer, good for any later combine.

    owner            the Buffer's identity
    chain            the chain that the dispatch was on
    num_rows         T of the dispatch: rows of the combine's output
    num_tokens       the dispatch's device scalar, or None where all T rows were real
    expected_tokens  most tokens any rank sends (0: max_tokens); only sizes the launch
    """

    owner: object
    chain: int
    num_rows: int
    num_tokens: torch.Tensor | None
    expected_tokens: int


@dataclass(slots=True)
class Received:
    """Rows that this rank's experts got. Tensors belong to the chain and last until its next
    dispatch; where no row was received their content is undefined.

    R ranks, M max_tokens, L local experts, H hidden, K top-k.

    x              "batched" [L, R*M, H]: expert l's rows are x[l, :recv_count[l]];
                   "contiguous" [rows, H]: expert l's are x[expert_offset[l]:][:recv_count[l]];
                   "compact" [R*M, H]: one row per message, those of source 0 first, without gaps.
                   bf16, or float8_e4m3fn with `scales`
    scales         float32 [..., H/128], value = x * scale; None for bf16
    recv_count     int32 [L]: rows of each local expert
    expert_offset  "contiguous" int32 [L+1]: multiples of the alignment; the last is the end
    topk_idx       "compact" int32 [R*M, K]: local expert; -1: another rank's, none, no row
    topk_weights   "compact" float32 [R*M, K]
    num_messages   int32 [R]: tokens received from each source
    handle         what combine takes
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    expert_offset: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_messages: torch.Tensor
    handle: Handle


@dataclass(frozen=True, slots=True)
class StepStats:
    """Sums on one rank and chain since the last reset of its statistics.

    messages_sent      (token, rank) pairs sent, this rank included
    messages_received  the same, received
    rows_received      (message, local expert) pairs
    bytes_dispatched   payload bytes sent by dispatch
    bytes_combined     payload bytes sent back by combine
    """

    messages_sent: int
    messages_received: int
    rows_received: int
    bytes_dispatched: int
    bytes_combined: int


@dataclass(slots=True)
class Inbox:
    """The receive tensors of one chain, allocated once: captured consumers know their addresses."""

    received: Received
    target: _C.RecvTarget

    def hand_out(self, handle: Handle) -> Received:
        r = self.received
        return Received(
            r.x,
            r.scales,
            r.recv_count,
            r.expert_offset,
            r.topk_idx,
            r.topk_weights,
            r.num_messages,
            handle,
        )


def allocate_inbox(
    config: EpConfig, num_ranks: int, chain: int, device: torch.device, owner: object
) -> Inbox:
    """Receive tensors of `chain` on `device`, in the configuration's format."""
    experts, rows = config.local_experts(num_ranks), config.recv_rows(num_ranks)
    lead = (experts, rows) if config.recv_format == "batched" else (rows,)
    fp8 = config.dispatch_format == "fp8"
    compact = config.recv_format == "compact"

    def tensor(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=device) if wanted else None

    x = torch.zeros(
        (*lead, config.hidden),
        dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16,
        device=device,
    )
    received = Received(
        x=x,
        scales=tensor(fp8, (*lead, config.hidden // SCALE_GROUP), torch.float32),
        recv_count=torch.zeros(experts, dtype=torch.int32, device=device),
        expert_offset=tensor(config.recv_format == "contiguous", (experts + 1,), torch.int32),
        topk_idx=tensor(compact, (rows, config.topk), torch.int32),
        topk_weights=tensor(compact, (rows, config.topk), torch.float32),
        num_messages=torch.zeros(num_ranks, dtype=torch.int32, device=device),
        handle=Handle(owner, chain, 0, None, 0),
    )
    target = _C.RecvTarget(
        format=FORMAT[config.recv_format],
        alignment=config.alignment,
        x=x.data_ptr(),
        scales=_address(received.scales),
        recv_count=received.recv_count.data_ptr(),
        expert_offset=_address(received.expert_offset),
        topk_idx=_address(received.topk_idx),
        topk_weights=_address(received.topk_weights),
        num_messages=received.num_messages.data_ptr(),
    )
    return Inbox(received, target)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
