"""The language model over expert-parallel ranks: how the runtime is used, in one file.

Attention is data-parallel: each rank decodes its own sequences and keeps their keys and values.
Experts are sharded: every layer sends its tokens to the ranks that own their experts and brings
the weighted results home. A layer is a generator that yields what it waits for, so the scheduler
can let one micro-batch compute while the other's rows are under way, on one rank or on many
virtual ones.

Numbers: the residual, attention, router and shared expert are float32 (from bf16 weights). Rows on
the wire are bf16, or fp8 if so configured. Routed experts multiply in bf16 with float32 sums on a
GPU and in float32 on a CPU, where bf16 matrices are slow; their results are bf16 again, and the
combine adds them in float32 in an order that does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_runtime.buffer import Buffer
from ep_runtime.config import DispatchFormat, EpConfig
from ep_runtime.errors import ConfigError
from ep_runtime.handles import Received
from ep_runtime.lm.checkpoint import Checkpoint
from ep_runtime.lm.config import VOCAB, LmConfig
from ep_runtime.lm.model import rms_norm, rope_table, rotate, route, swiglu
from ep_runtime.scheduler import Stage, run_interleaved

Tensors = dict[str, Tensor]


def ep_config(
    model: LmConfig,
    max_tokens: int,
    *,
    microbatches: int = 1,
    dispatch_format: DispatchFormat = "bf16",
) -> EpConfig:
    """The group configuration for this model: `max_tokens` sequences per rank, a chain per
    micro-batch."""
    return EpConfig(
        num_experts=model.num_experts,
        topk=model.topk,
        hidden=model.hidden,
        max_tokens=max_tokens,
        num_chains=microbatches,
        dispatch_format=dispatch_format,
        recv_format="batched",
    )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer on one rank: the rank's own experts in the dtype they multiply in, the rest in
    float32."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [3H, H]
    attention_out: Tensor  # [H, H]
    moe_norm: Tensor  # [H]
    router: Tensor  # [E, H]
    gate_up: Tensor  # [L, 2F, H]
    down: Tensor  # [L, H, F]
    shared_gate_up: Tensor  # [2S, H]
    shared_down: Tensor  # [H, S]


@dataclass(frozen=True, slots=True)
class Lane:
    """One micro-batch of a step: every `stride`-th row of the batch, from `chain` on.

    tokens, positions [T] int64; num_tokens int32 scalar, rows from it on are padding; keys and
    values [layers, T, heads, max_context, head_dim] are views of the rank's cache.
    """

    chain: int
    tokens: Tensor
    positions: Tensor
    num_tokens: Tensor
    keys: Tensor
    values: Tensor


class RankModel:
    """One rank's weights and KV cache, for up to `Buffer.config.max_tokens` sequences.

    Raises ConfigError where the buffer's group does not fit the model.
    """

    def __init__(self, checkpoint: Checkpoint, buffer: Buffer) -> None:
        self.config = c = checkpoint.config
        self.buffer = buffer
        self.device = buffer.device
        _check_group(c, buffer.config)
        self._names = {name: w.to(self.device) for name, w in checkpoint.weights.items()}
        self.embedding = self._names["embedding"].float()
        self.final_norm = self._names["final_norm"].float()
        self.layers = [self._layer(f"layers.{i}.") for i in range(c.layers)]
        del self._names
        self.rope = rope_table(c).to(self.device)
        self.context = torch.arange(c.max_context, device=self.device)
        rows = buffer.config.max_tokens
        shape = (2, c.layers, rows, c.heads, c.max_context, c.head_dim)
        self.cache = torch.zeros(shape, device=self.device)

    def _layer(self, prefix: str) -> LayerWeights:
        mine = self.buffer.local_experts
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        shards = {
            name: self._names[prefix + name][mine.start : mine.stop].to(dtype).contiguous()
            for name in ("gate_up", "down")
        }
        whole = {
            field.name: self._names[prefix + field.name].float()
            for field in fields(LayerWeights)
            if field.name not in shards
        }
        return LayerWeights(**whole, **shards)

    # ---- a step, for one micro-batch ------------------------------------------------------------

    def forward(self, lane: Lane) -> Stage:
        """Logits [T, 256] float32 of the next token. Writes the cache at `positions`.

        Capturable.
        """
        hidden = self.embedding[lane.tokens]
        for index, weights in enumerate(self.layers):
            hidden = hidden + self.attention(weights, index, lane, hidden)
            hidden = yield from self.moe(weights, lane, hidden)
        return F.linear(rms_norm(hidden, self.final_norm, self.config.norm_eps), self.embedding)

    def moe(self, weights: LayerWeights, lane: Lane, hidden: Tensor) -> Stage:
        """Dispatch -> experts -> combine, and the shared expert while the rows are under way."""
        x = rms_norm(hidden, weights.moe_norm, self.config.norm_eps)
        index, gate, _ = route(x, weights.router, self.config.topk)
        # Ranks mostly replay the same bucket: kernels for as many rows are right for all.
        sent = self.buffer.dispatch(
            x.bfloat16(), index, gate, chain=lane.chain, num_tokens=lane.num_tokens,
            expected_tokens=len(x),
        )  # fmt: skip
        shared = F.linear(swiglu(F.linear(x, weights.shared_gate_up)), weights.shared_down)
        received: Received = yield sent
        y = run_experts(received, weights.gate_up, weights.down)
        routed: Tensor = yield self.buffer.combine(y, received.handle)
        return hidden + shared + routed

    def attention(self, weights: LayerWeights, index: int, lane: Lane, hidden: Tensor) -> Tensor:
        """One query per row against the row's own cache."""
        c, rows = self.config, torch.arange(lane.tokens.shape[0], device=self.device)
        x = rms_norm(hidden, weights.attention_norm, c.norm_eps)
        qkv = F.linear(x, weights.qkv).view(-1, 3, c.heads, c.head_dim)
        table = self.rope[lane.positions]
        keys, values = lane.keys[index], lane.values[index]
        keys[rows, :, lane.positions] = rotate(qkv[:, 1], table)
        values[rows, :, lane.positions] = qkv[:, 2]
        seen = self.context <= lane.positions[:, None]
        out = F.scaled_dot_product_attention(
            rotate(qkv[:, 0], table)[:, :, None], keys, values, attn_mask=seen[:, None, None]
        )
        return F.linear(out.reshape(-1, c.hidden), weights.attention_out)

    # ---- batches --------------------------------------------------------------------------------

    def lanes(self, inputs: Tensors, num_tokens: Tensor, microbatches: int) -> list[Lane]:
        """Split a batch: row i goes to micro-batch i % microbatches, so all get about equally many
        real rows whatever `num_tokens` is."""
        keys, values = self.cache[:, :, : inputs["tokens"].shape[0]]
        count = microbatches
        return [
            Lane(
                chain,
                inputs["tokens"][chain::count],
                inputs["positions"][chain::count],
                (num_tokens + (count - 1 - chain)) // count if count > 1 else num_tokens,
                keys[:, chain::count],
                values[:, chain::count],
            )
            for chain in range(count)
        ]

    def move_row(self, source: int, target: int) -> None:
        """Give the sequence of row `source` the row `target`. Between steps; launches copies."""
        self.cache[:, :, target].copy_(self.cache[:, :, source])


class DecodeStep:
    """One decode step of all ranks of this process, as `graphs.DecodeGraphs` takes it.

    Inputs per rank: tokens [B], positions [B] int64. Outputs: logits [B, 256] float32 and next [B]
    int64, the greedy choice. Capturable.
    """

    def __init__(self, models: Sequence[RankModel], microbatches: int = 1) -> None:
        chains = models[0].buffer.config.num_chains
        if not 1 <= microbatches <= chains:
            raise ConfigError(
                f"microbatches={microbatches}: each needs a chain and the group has {chains}; "
                "build the group with ep_config(..., microbatches=...)"
            )
        self.models = models
        self.microbatches = microbatches

    def make_inputs(self, rows: int) -> list[Tensors]:
        return [
            {
                name: torch.zeros(rows, dtype=torch.int64, device=model.device)
                for name in ("tokens", "positions")
            }
            for model in self.models
        ]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensors], num_tokens: Sequence[Tensor]) -> list[Tensors]:
        per_rank = [
            [model.forward(lane) for lane in model.lanes(mine, count, self.microbatches)]
            for model, mine, count in zip(self.models, inputs, num_tokens, strict=True)
        ]
        # A micro-batch is advanced on all ranks of this process together: sends before receives.
        done = run_interleaved(list(zip(*per_rank, strict=True)))
        return [self._join(parts) for parts in zip(*done, strict=True)]

    def _join(self, parts: Sequence[Tensor]) -> Tensors:
        """Put the micro-batches' rows back in order."""
        if len(parts) == 1:
            logits = parts[0]
        else:
            rows = sum(part.shape[0] for part in parts)
            logits = parts[0].new_empty(rows, VOCAB)
            for chain, part in enumerate(parts):
                logits[chain :: len(parts)] = part
        return {"logits": logits, "next": logits.argmax(dim=-1)}


def run_experts(received: Received, gate_up: Tensor, down: Tensor) -> Tensor:
    """The local experts on all received rows: [L, R*M, H] in and out, bf16.

    Rows that nobody sent are computed too: their number is known on the device only, and a graph
    has fixed shapes. They are never combined.
    """
    x = received.x
    if received.scales is not None:  # fp8: value = x * scale, one scale per 128 channels
        groups = x.float().view(*received.scales.shape, -1)
        x = (groups * received.scales[..., None]).flatten(-2)
    inner = swiglu(torch.bmm(x.to(gate_up.dtype), gate_up.transpose(1, 2)).float())
    return torch.bmm(inner.to(down.dtype), down.transpose(1, 2)).bfloat16()


def _check_group(model: LmConfig, group: EpConfig) -> None:
    for name in ("num_experts", "topk", "hidden"):
        have, want = getattr(group, name), getattr(model, name)
        if have != want:
            raise ConfigError(
                f"the group has {name}={have}, the checkpoint {want}; build the group with "
                "ep_runtime.lm.parallel.ep_config(checkpoint.config, ...)"
            )
    if group.recv_format != "batched":
        raise ConfigError(
            f"the group has recv_format={group.recv_format!r}; the model's experts take 'batched'"
        )
