"""The example layers on virtual ranks of any backend: poisoned, run, compared with FP64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from support import Snapshot, poison, random_counts, random_input

from ep_runtime import EpConfig, virtual_ranks
from ep_runtime.graphs import DecodeGraphs
from ep_runtime.reference import RankInput
from examples.experts.exact import ERROR_LIMIT, exact_layer, random_weights, share_of
from examples.experts.parts import ROW_TILE
from examples.experts.run import EXPERTS

INNER = 192


def config_of(recv_format: str, wire: str, num_ranks: int, **more: object) -> EpConfig:
    """Three experts a rank; token numbers that no tile divides."""
    sizes: dict[str, object] = {
        "num_experts": 3 * num_ranks,
        "topk": 3,
        "hidden": 384,
        "max_tokens": 21,
        "num_chains": 1,
        "dispatch_format": wire,
        "recv_format": recv_format,
        "alignment": ROW_TILE if recv_format == "contiguous" else 1,
    }
    return EpConfig(**{**sizes, **more})  # type: ignore[arg-type]


def layer_inputs(rng: torch.Generator, config: EpConfig, num_ranks: int) -> list[RankInput]:
    """Uneven numbers of tokens, entries without an expert, rows of one magnitude: a token's experts
    must not drown in each other's rounding."""
    inputs = []
    for rows in random_counts(rng, num_ranks, config.max_tokens):
        one = random_input(rng, config, rows)
        x = torch.randn(one.x.shape, generator=rng).bfloat16()
        inputs.append(RankInput(x, one.topk_idx, one.topk_weights))
    return inputs


class LayerGroup:
    """All ranks' Buffers and experts in this process."""

    def __init__(
        self, rng: torch.Generator, config: EpConfig, num_ranks: int, backend: str, inner: int
    ) -> None:
        devices = [0] if backend == "cuda" else None
        self.config = config
        self.weights = random_weights(rng, config.num_experts, config.hidden, inner)
        self.buffers = virtual_ranks(config, num_ranks, backend, devices)  # type: ignore[arg-type]
        self.experts = [
            EXPERTS[config.recv_format](
                share_of(self.weights, b.rank, num_ranks, b.device), config, num_ranks
            )
            for b in self.buffers
        ]

    def poison(self) -> None:
        """Everything that a step writes."""
        for buffer, experts in zip(self.buffers, self.experts, strict=True):
            received = buffer._inboxes[0].received
            for field in fields(Snapshot):
                poison(getattr(received, field.name))
            for tensor in experts.workspace():
                poison(tensor)

    def layer(
        self,
        routed: Sequence[Sequence[torch.Tensor]],
        num_tokens: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """The layer on every rank: each one's sends before any one's waits."""
        counts = num_tokens or [None] * len(self.buffers)
        sent = [
            b.dispatch(*r, num_tokens=n)
            for b, r, n in zip(self.buffers, routed, counts, strict=True)
        ]
        received = [pending.wait() for pending in sent]
        ys = [experts(r) for experts, r in zip(self.experts, received, strict=True)]
        back = [b.combine(y, r.handle) for b, y, r in zip(self.buffers, ys, received, strict=True)]
        return [pending.wait() for pending in back]

    def on_device(self, inputs: list[RankInput]) -> list[list[torch.Tensor]]:
        return [
            [t.to(b.device) for t in (one.x, one.topk_idx, one.topk_weights)]
            for b, one in zip(self.buffers, inputs, strict=True)
        ]

    def check(self, inputs: list[RankInput], outs: list[torch.Tensor]) -> None:
        """Every rank's tokens are right, and no rank recorded a fault."""
        for rank, (one, out) in enumerate(zip(inputs, outs, strict=True)):
            exact = exact_layer(
                one.x, one.topk_idx, one.topk_weights, self.weights, self.config.dispatch_format
            )
            error = exact.error(out.cpu())
            assert error <= ERROR_LIMIT, f"rank {rank}: off by {error:.3g}"
        for buffer in self.buffers:
            buffer.check()

    def check_replays(self, rng: torch.Generator, turns: int) -> None:
        """Capture the layer for two buckets and replay both in turn, every time with new rows."""
        config, names = self.config, ("x", "idx", "weights")

        def step(inputs: list[dict[str, torch.Tensor]], counts: Any) -> list[dict[str, Any]]:
            routed = [[one[name] for name in names] for one in inputs]
            return [{"out": out} for out in self.layer(routed, counts)]

        graphs = DecodeGraphs(self.buffers, step, self._empty, (8, config.max_tokens))
        for _ in range(turns):
            for most in (config.max_tokens, 5):
                inputs = [
                    RankInput(one.x[:most], one.topk_idx[:most].long(), one.topk_weights[:most])
                    for one in layer_inputs(rng, config, len(self.buffers))
                ]
                given = [dict(zip(names, t, strict=True)) for t in self.on_device(inputs)]
                self.poison()
                found = graphs.replay(given, [len(one.x) for one in inputs])
                outs = [one["out"][: len(i.x)] for one, i in zip(found, inputs, strict=True)]
                self.check(inputs, outs)
        assert sum(report.replays for report in graphs.report()) == 2 * turns

    def _empty(self, rows: int) -> list[dict[str, torch.Tensor]]:
        table = (rows, self.config.topk)
        return [
            {
                "x": torch.zeros(rows, self.config.hidden, dtype=torch.bfloat16, device=b.device),
                "idx": torch.full(table, -1, device=b.device),
                "weights": torch.zeros(table, device=b.device),
            }
            for b in self.buffers
        ]

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()
