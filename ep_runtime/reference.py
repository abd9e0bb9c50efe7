"""What dispatch and combine must produce, in plain torch: every rank's inputs in, every rank's
outputs out. Shares no code with the native module; slow and simple on purpose. CPU tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ep_runtime.config import EpConfig
from ep_runtime.reference_wire import (
    FP8_MAX,
    MIN_SUM_AMAX,
    SCALE_GROUP,
    dequantize_fp8,
    quantize_fp8,
    quantize_sums,
    wire_rows,
)

__all__ = [
    "SCALE_GROUP",
    "Combined",
    "Expected",
    "RankInput",
    "clean_routes",
    "combine",
    "combine_in_order",
    "dequantize_fp8",
    "dispatch",
    "quantize_fp8",
    "without",
]

BF16_HALF_ULP = 2.0**-8  # the largest relative error of one rounding to BF16
FP32_HALF_ULP = 2.0**-24
FP8_HALF_ULP = 2.0**-4  # of e4m3
FP8_HALF_SUBNORMAL = 2.0**-10  # half the distance of its smallest numbers


@dataclass(frozen=True, slots=True)
class RankInput:
    """What one rank dispatches: x [T, H] bf16, topk_idx [T, K], topk_weights [T, K] f32.

    num_tokens  how many of the T rows are real; None: all
    scales      [T, words] of a 4-byte dtype, where opaque rows x [T, n] come with scales
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_tokens: int | None = None
    scales: torch.Tensor | None = None

    @property
    def num_real(self) -> int:
        rows = self.x.shape[0]
        return rows if self.num_tokens is None else max(0, min(rows, self.num_tokens))


@dataclass(frozen=True, slots=True)
class Expected:
    """What one rank receives. Fields as in `Received`; `valid` marks the defined rows of x."""

    x: torch.Tensor
    scales: torch.Tensor | None
    valid: torch.Tensor
    recv_count: torch.Tensor
    expert_offset: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_messages: torch.Tensor
    source_token: torch.Tensor | None
    layout_range: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Combined:
    """One rank's combine result in FP64, and how far a correct one may be from it, elementwise."""

    exact: torch.Tensor
    bound: torch.Tensor


def clean_routes(config: EpConfig, rank_input: RankInput) -> tuple[torch.Tensor, int]:
    """topk_idx of the real rows with every unusable entry set to -1, and how many those were.

    Unusable: outside 0 .. E - 1 (other than -1), or an expert that the token named before.
    """
    idx = rank_input.topk_idx[: rank_input.num_real].long().clone()
    named_before = (idx[:, :, None] == idx[:, None, :]).tril(-1).any(-1) & (idx != -1)
    bad = (idx < -1) | (idx >= config.num_experts) | named_before
    idx[bad] = -1
    return idx, int(bad.sum())


@dataclass(frozen=True, slots=True)
class _Places:
    """Where one rank puts what it receives. A flat token is source * M + token.

    token_of  [rows] flat token of each row of x (experts counted through), -1: none
    row_of    [R*M, K] row that holds a token's entry k on this rank, -1: not here
    """

    counts: list[int]
    messages: list[int]
    first_row: list[int]
    token_of: torch.Tensor
    row_of: torch.Tensor


def _first_rows(config: EpConfig, counts: list[int], num_ranks: int) -> list[int]:
    """First row of each local expert, and the end of the last."""
    if config.recv_format == "batched":
        return [expert * config.recv_rows(num_ranks) for expert in range(len(counts) + 1)]
    first = [0]
    for count in counts:
        first.append(first[-1] + -(-count // config.alignment) * config.alignment)
    return first


def _places(config: EpConfig, inputs: Sequence[RankInput], rank: int) -> _Places:
    """Rows in the order of sources, then tokens: of each expert, or (compact) of the rank."""
    num_ranks, compact = len(inputs), config.recv_format == "compact"
    experts = config.local_experts(num_ranks)
    routes = [
        [[e - rank * experts for e in chosen] for chosen in clean_routes(config, one)[0].tolist()]
        for one in inputs
    ]
    counts, messages = [0] * experts, [0] * num_ranks
    for source, tokens in enumerate(routes):
        for chosen in tokens:
            here = [e for e in chosen if 0 <= e < experts]
            messages[source] += bool(here)
            for e in here:
                counts[e] += 1
    first = _first_rows(config, counts, num_ranks)
    rows = config.recv_rows(num_ranks) * (experts if config.recv_format == "batched" else 1)
    token_of = torch.full((rows,), -1)
    row_of = torch.full((num_ranks * config.max_tokens, config.topk), -1)
    following = [0] if compact else list(first)
    for source, tokens in enumerate(routes):
        for token, chosen in enumerate(tokens):
            flat = source * config.max_tokens + token
            here = [(k, e) for k, e in enumerate(chosen) if 0 <= e < experts]
            for k, e in here[:1] if compact else here:
                cursor = 0 if compact else e
                token_of[following[cursor]] = flat
                row_of[flat, k] = following[cursor]
                following[cursor] += 1
    return _Places(counts, messages, first, token_of, row_of)


def without(
    config: EpConfig, inputs: Sequence[RankInput], masked: Collection[int]
) -> list[RankInput]:
    """The inputs as they count where the ranks in `masked` are masked on all others: those send
    nothing, and nobody chooses their experts.
    """
    experts = config.local_experts(len(inputs))
    kept = []
    for rank, one in enumerate(inputs):
        idx = one.topk_idx.clone()
        for peer in masked:
            idx[(idx >= peer * experts) & (idx < (peer + 1) * experts)] = -1
        kept.append(replace(one, topk_idx=idx, num_tokens=0 if rank in masked else one.num_tokens))
    return kept


def dispatch(config: EpConfig, inputs: Sequence[RankInput]) -> list[Expected]:
    """What every rank receives from one dispatch of all ranks."""
    return [_receive(config, inputs, rank) for rank in range(len(inputs))]


def _receive(config: EpConfig, inputs: Sequence[RankInput], rank: int) -> Expected:
    places = _places(config, inputs, rank)
    compact = config.recv_format == "compact"
    local_idx, weights = _local_choices(config, inputs, rank, places.token_of)
    x, scales = _sent_rows(config, inputs, places.token_of)
    batched = config.recv_format == "batched"
    lead = (len(places.counts), -1) if batched else (-1,)
    offset = torch.tensor(places.first_row, dtype=torch.int32)
    return Expected(
        x=_shaped(x, lead),
        scales=None if scales is None else _shaped(scales, lead),
        valid=(places.token_of >= 0).view(lead),
        recv_count=torch.tensor(places.counts, dtype=torch.int32),
        expert_offset=offset if config.recv_format == "contiguous" else None,
        topk_idx=local_idx if compact else None,
        topk_weights=weights if compact else None,
        num_messages=torch.tensor(places.messages, dtype=torch.int32),
        source_token=(places.token_of % config.max_tokens).int().view(lead) if batched else None,
        layout_range=_layout_range(config, places, len(inputs)) if batched else None,
    )


def _shaped(rows: torch.Tensor, lead: tuple[int, ...]) -> torch.Tensor:
    """[L*n, width] -> [*lead, width]; a width of 0 would leave view() to guess."""
    return rows if len(lead) == 1 else rows.view(lead[0], len(rows) // lead[0], rows.shape[1])


def _layout_range(config: EpConfig, places: _Places, num_ranks: int) -> torch.Tensor:
    """[L, R] int64: (first row of the source within the expert << 32) | its rows."""
    source_of = torch.where(places.token_of >= 0, places.token_of // config.max_tokens, -1)
    of_expert = source_of.view(len(places.counts), -1)
    rows = torch.stack([(of_expert == source).sum(1) for source in range(num_ranks)], dim=1)
    first = rows.cumsum(1) - rows
    return (first << 32) | rows


def _local_choices(
    config: EpConfig, inputs: Sequence[RankInput], rank: int, token_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local expert (or -1) and weight (or 0) of every entry of every row's token."""
    experts, tokens = config.local_experts(len(inputs)), config.max_tokens
    chosen = torch.full((len(inputs) * tokens, config.topk), -1)
    weight = torch.zeros((len(inputs) * tokens, config.topk), dtype=torch.float32)
    for source, one in enumerate(inputs):
        routes = clean_routes(config, one)[0]
        chosen[source * tokens : source * tokens + routes.shape[0]] = routes
        weight[source * tokens : source * tokens + one.x.shape[0]] = one.topk_weights
    here = (chosen >= rank * experts) & (chosen < (rank + 1) * experts)
    local = torch.where(here, chosen - rank * experts, -1)
    picked, valid = token_of.clamp_min(0), (token_of >= 0)[:, None]
    idx = torch.where(valid, local[picked], -1)
    return idx.int(), torch.where(idx >= 0, weight[picked], 0.0)


def _sent_rows(
    config: EpConfig, inputs: Sequence[RankInput], token_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of flat tokens as they travel (rows of token -1 hold anything)."""
    num_slots = len(inputs) * config.max_tokens
    travelled = [wire_rows(config, one.x, one.scales) for one in inputs]
    flat = _flat_tokens(config, inputs)
    picked = token_of.clamp_min(0)

    def gathered(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.cat([part.view(torch.uint8) for part in parts])  # FP8 has no indexing
        slots = rows.new_zeros((num_slots, rows.shape[-1]))
        slots[flat] = rows
        return slots[picked].view(parts[0].dtype)

    scales = [scale for _, scale in travelled if scale is not None]
    return gathered([rows.contiguous() for rows, _ in travelled]), gathered(
        scales
    ) if scales else None


def _flat_tokens(config: EpConfig, inputs: Sequence[RankInput]) -> torch.Tensor:
    """Flat token of every row of every rank, one after the other."""
    return torch.cat(
        [r * config.max_tokens + torch.arange(len(one.x)) for r, one in enumerate(inputs)]
    )


def _entry_weights(config: EpConfig, inputs: Sequence[RankInput]) -> torch.Tensor:
    """[R*M, K] f32 weights that a combine applies: 1 where the rows are already weighted."""
    weights = torch.zeros((len(inputs) * config.max_tokens, config.topk), dtype=torch.float32)
    for source, one in enumerate(inputs):
        start = source * config.max_tokens
        weights[start : start + one.x.shape[0]] = one.topk_weights
    return torch.ones_like(weights) if config.recv_format == "compact" else weights


def _terms(
    config: EpConfig, inputs: Sequence[RankInput], outputs: Sequence[torch.Tensor], rank: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What `rank` adds up: per k the FP64 rows [R*M, H] (0 where none), and where it has any."""
    row_of = _places(config, inputs, rank).row_of
    y = outputs[rank].reshape(-1, config.hidden).double()
    rows = [
        torch.where((row_of[:, k] >= 0)[:, None], y[row_of[:, k].clamp_min(0)], 0.0)
        for k in range(config.topk)
    ]
    return rows, (row_of >= 0).any(1)


def _per_source(
    config: EpConfig, inputs: Sequence[RankInput], flat: torch.Tensor
) -> list[torch.Tensor]:
    """[R*M, H] -> one [T, H] per rank."""
    tokens = config.max_tokens
    return [flat[r * tokens : r * tokens + one.x.shape[0]] for r, one in enumerate(inputs)]


def combine(
    config: EpConfig, inputs: Sequence[RankInput], outputs: Sequence[torch.Tensor]
) -> list[Combined]:
    """Every rank's result in FP64. outputs[r]: bf16, in the shape of rank r's Received.x."""
    weights = _entry_weights(config, inputs).double()
    total = torch.zeros((weights.shape[0], config.hidden), dtype=torch.float64)
    travelling = torch.zeros_like(total)
    partials, products = torch.zeros_like(total), torch.zeros_like(total)
    for rank in range(len(inputs)):
        partial = torch.zeros_like(total)
        for k, rows in enumerate(_terms(config, inputs, outputs, rank)[0]):
            partial += weights[:, k, None] * rows
            products += (weights[:, k, None] * rows).abs()
        total += partial
        partials += partial.abs()
        if config.combine_format == "fp8":
            travelling += _fp8_bound(partial)
    if config.combine_format == "bf16":
        travelling = BF16_HALF_ULP * partials
    # One rounding per partial sum, one of the total, and FP32 additions in between.
    additions = 2 * (config.topk + len(inputs)) * FP32_HALF_ULP * products
    bound = 1.01 * (travelling + BF16_HALF_ULP * total.abs() + additions)
    # A partial's own rounding moves the total that is rounded last.
    bound += BF16_HALF_ULP * travelling + torch.finfo(torch.bfloat16).tiny
    return [
        Combined(exact, limit)
        for exact, limit in zip(
            _per_source(config, inputs, total), _per_source(config, inputs, bound), strict=True
        )
    ]


def _fp8_bound(partial: torch.Tensor) -> torch.Tensor:
    """How far rounding to e4m3 moves each value: half its step, or half that of subnormals."""
    groups = partial.view(*partial.shape[:-1], -1, SCALE_GROUP)
    amax = groups.abs().amax(-1).clamp_min(MIN_SUM_AMAX)
    smallest = FP8_HALF_SUBNORMAL / FP8_MAX * amax.repeat_interleave(SCALE_GROUP, dim=-1)
    return torch.maximum(FP8_HALF_ULP * partial.abs(), smallest)


def _travelled(config: EpConfig, partial: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """total + a rank's sum as it arrives, in FP32."""
    if config.combine_format == "bf16":
        return total + partial.bfloat16().float()
    values, scales = quantize_sums(partial)
    scale = scales.double().repeat_interleave(SCALE_GROUP, dim=-1)
    return (scale * values.double() + total.double()).float()


def combine_in_order(
    config: EpConfig, inputs: Sequence[RankInput], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Every rank's result in BF16, with the protocol's roundings.

    Per rank: acc = fma(weight, row, acc) in FP32, in k order from 0, rounded to BF16, or to FP8
    with its scale. Then the ranks' sums added in FP32, in rank order from 0 (FP8: fma(scale, value,
    acc)), rounded to BF16. The fma is made in FP64 and
    rounded to FP32: twice rounded, so a result may differ from a true one by one BF16 ulp.
    """
    weights = _entry_weights(config, inputs).double()
    total = torch.zeros((weights.shape[0], config.hidden), dtype=torch.float32)
    for rank in range(len(inputs)):
        terms, sent = _terms(config, inputs, outputs, rank)
        partial = torch.zeros_like(total)
        for k, rows in enumerate(terms):
            partial = (weights[:, k, None] * rows + partial.double()).float()
        total = torch.where(sent[:, None], _travelled(config, partial, total), total)
    return _per_source(config, inputs, total.bfloat16())
