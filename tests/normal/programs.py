"""What one rank of a group does in a test. Module-level functions, so that processes find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ep_runtime import _C
from ep_runtime.normal import Layout, NormalBuffer, NormalHandle, NormalReceived
from ep_runtime.normal.reference import RankTokens

UNWRITTEN = -1  # int32, of POISON
POISON = 0xFF  # NaN as fp8, bf16 and f32; -1 as an integer: what nobody sends
_kept: dict[tuple[int, str], Any] = {}  # of this process's buffers, between programs


@dataclass
class Rows:
    """A NormalReceived, copied to the CPU."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    source_token: torch.Tensor
    recv_per_expert: list[int]
    recv_counts: torch.Tensor | None
    rank_prefix: torch.Tensor
    send_position: torch.Tensor


def keep(buffer: NormalBuffer, name: str, value: Any) -> Any:
    """Leave something for a later program of the same rank."""
    _kept[id(buffer), name] = value
    return value


def kept(buffer: NormalBuffer, name: str) -> Any:
    return _kept[id(buffer), name]


def drop(buffer: NormalBuffer, name: str) -> None:
    _kept.pop((id(buffer), name), None)


def finish(buffer: NormalBuffer) -> None:
    """Wait for the rank's own stream before anything is copied out.

    A copy to pageable memory waits inside the driver, and ranks of one process that share a GPU
    need it meanwhile to launch what this one's kernel waits for.
    """
    if buffer.device.type == "cuda":
        torch.cuda.current_stream(buffer.device).synchronize()


def to_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu().clone()


def snapshot(buffer: NormalBuffer, received: NormalReceived) -> Rows:
    """Copies of all that was received, once it is there."""
    finish(buffer)
    handle = received.handle
    values = [
        to_cpu(getattr(received, name))
        for name in ("x", "scales", "topk_idx", "topk_weights", "source_token")
    ]
    return Rows(
        *values,  # type: ignore[arg-type]
        received.recv_per_expert,
        to_cpu(received.recv_counts),
        handle.rank_prefix.cpu().clone(),
        handle.send_position.cpu().clone(),
    )


def rows_of(buffer: NormalBuffer, tokens: RankTokens, extra: int = 0) -> Any:
    """x or (x, scales) on the device; `extra` channels of poison between the rows."""
    x = tokens.x
    wide = torch.empty((x.shape[0], x.shape[1] + extra), dtype=x.dtype, device=buffer.device)
    wide.view(torch.uint8).fill_(POISON)
    wide[:, : x.shape[1]] = x.to(buffer.device)
    rows = wide[:, : x.shape[1]]
    if tokens.scales is None:
        return rows
    scales = tokens.scales
    if scales.dim() == 2:  # column-major, as quantisers for grouped GEMMs leave them
        held = scales.t().contiguous().to(buffer.device).t()
    else:
        held = scales.to(buffer.device)
    return rows, held


def poison(buffer: NormalBuffer) -> None:
    """Overwrite this rank's whole data heap. No operation may be in flight on any rank."""
    for one in (buffer, *buffer._parts):
        one._heap.view(0, one._heap.sizes.total, None).fill_(POISON)
    buffer._ops.synchronize()


def poison_pool(buffer: NormalBuffer) -> None:
    """Overwrite what this rank hands out next; peers may be at work, but not on blocks."""
    if buffer.pool_in_use == 0:
        for one in (buffer, *buffer._parts):
            sizes = one._heap.sizes
            one._heap.view(sizes.pool_offset, sizes.pool, None).fill_(POISON)


def dispatch(buffer: NormalBuffer, tokens: RankTokens, extra: int = 0, **options: Any) -> Rows:
    """Dispatch, keep the result as "last", and copy it."""
    received = buffer.dispatch(
        rows_of(buffer, tokens, extra),
        tokens.topk_idx.to(buffer.device),
        tokens.topk_weights.to(buffer.device),
        **options,
    )
    return snapshot(buffer, keep(buffer, "last", received))


def dispatch_with(
    buffer: NormalBuffer, tokens: RankTokens, options: dict[str, Any], extra: int = 0
) -> Rows:
    return dispatch(buffer, tokens, extra, **options)


def layout_then_dispatch(
    buffer: NormalBuffer, tokens: RankTokens, num_experts: int, with_topk: bool
) -> tuple[list[torch.Tensor], Rows]:
    """The layout as a call of its own; without top-k the dispatch sends rows alone."""
    idx = tokens.topk_idx.to(buffer.device)
    layout: Layout = buffer.layout(idx, num_experts)
    found = [
        tensor.cpu().clone()
        for tensor in (layout.tokens_per_rank, layout.tokens_per_expert, layout.is_token_in_rank)
    ]
    rows = rows_of(buffer, tokens)
    if with_topk:
        weights = tokens.topk_weights.to(buffer.device)
        received = buffer.dispatch(rows, idx, weights, layout=layout)
    else:
        received = buffer.dispatch(rows, layout=layout)
    return found, snapshot(buffer, received)


def dispatch_contradicting(
    buffer: NormalBuffer, tokens: RankTokens, num_experts: int, more: int
) -> Rows:
    """Along a layout that announces `more` tokens for the last rank than it sends there."""
    idx, weights = tokens.topk_idx.to(buffer.device), tokens.topk_weights.to(buffer.device)
    layout = buffer.layout(idx, num_experts)
    layout.tokens_per_rank[-1] += more
    return snapshot(buffer, buffer.dispatch(rows_of(buffer, tokens), idx, weights, layout=layout))


def dispatch_everywhere(buffer: NormalBuffer, tokens: RankTokens) -> Rows:
    """Every row to all ranks, along a layout that no topk_idx stands behind; kept as "last"."""
    ranks, count = buffer.num_ranks, tokens.x.shape[0]

    def counts() -> torch.Tensor:
        return torch.full((ranks,), count, dtype=torch.int32, device=buffer.device)

    goes = torch.ones(count, ranks, dtype=torch.bool, device=buffer.device)
    received = buffer.dispatch(rows_of(buffer, tokens), layout=Layout(counts(), counts(), goes))
    return snapshot(buffer, keep(buffer, "last", received))


def cached(
    buffer: NormalBuffer, tokens: RankTokens, name: str = "last", weights: bool = False
) -> Rows:
    """dispatch_cached() along the handle of what was kept under `name`."""
    handle: NormalHandle = kept(buffer, name).handle
    given = tokens.topk_weights.to(buffer.device) if weights else None
    received = buffer.dispatch_cached(rows_of(buffer, tokens), handle, topk_weights=given)
    return snapshot(buffer, received)


def rename(buffer: NormalBuffer, name: str) -> None:
    """Keep the last result under another name as well."""
    keep(buffer, name, kept(buffer, "last"))


def combine(
    buffer: NormalBuffer,
    y: torch.Tensor,
    weights: torch.Tensor | None,
    bias: list[torch.Tensor],
    name: str = "last",
    extra: int = 0,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """combine() along a kept handle, into a poisoned tensor."""
    handle: NormalHandle = kept(buffer, name).handle
    device = buffer.device
    out = torch.empty((handle.num_tokens, y.shape[1]), dtype=torch.bfloat16, device=device)
    out.view(torch.uint8).fill_(POISON)
    biases = [one.to(device) for one in bias]
    rows = rows_of(buffer, RankTokens(y, torch.empty(0), torch.empty(0)), extra)
    got, got_weights = buffer.combine(
        rows,
        handle,
        topk_weights=None if weights is None else weights.to(device),
        bias=None if not biases else biases[0] if len(biases) == 1 else (biases[0], biases[1]),
        out=out,
        num_sms=num_sms,
    )
    assert got is out
    finish(buffer)
    return got.cpu().clone(), to_cpu(got_weights)


def packed_words(buffer: NormalBuffer, rows: int, hidden: int, topk: int) -> torch.Tensor:
    """What the last combine left in the inbox about the pieces of each row, int32 [rows]."""
    finish(buffer)
    if rows == 0:
        return torch.empty(0, dtype=torch.int32)
    heap = buffer._heap
    start = heap.sizes.inbox_offset + _C.normal_inbox(rows, hidden, topk)["packed"]
    return heap.view(start, 4 * rows, None).view(torch.int32).cpu().clone()


def query(buffer: NormalBuffer, name: str, *arguments: Any) -> Any:
    """An attribute of the buffer, called if it is a method."""
    value = getattr(buffer, name)
    return value(*arguments) if callable(value) else value


def drop_all(buffer: NormalBuffer) -> None:
    """Drop every kept result. Also of a closed buffer: the next one may have its id()."""
    for key in [key for key in _kept if key[0] == id(buffer)]:
        del _kept[key]


def forget(buffer: NormalBuffer) -> int:
    """Drop every kept result; bytes of the pool still in use."""
    drop_all(buffer)
    return buffer.pool_in_use
