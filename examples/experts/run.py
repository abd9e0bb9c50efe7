"""The examples' command: a layer over several ranks, eager and replayed, checked on every rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ep_runtime import Buffer, EpConfig, World
from ep_runtime.config import DispatchFormat, RecvFormat
from ep_runtime.connect import Backend
from ep_runtime.errors import EpError
from ep_runtime.graphs import DecodeGraphs
from ep_runtime.launch import launch
from examples.experts.batched import BatchedExperts
from examples.experts.compact import CompactExperts
from examples.experts.contiguous import ContiguousExperts
from examples.experts.exact import ERROR_LIMIT, exact_layer, random_weights, share_of
from examples.experts.parts import ROW_TILE, Experts, ExpertWeights

EXPERTS: dict[str, Callable[[ExpertWeights, EpConfig, int], Experts]] = {
    "batched": BatchedExperts,
    "contiguous": ContiguousExperts,
    "compact": CompactExperts,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The same on every rank. inner: I; tokens: T of the largest bucket."""

    recv_format: RecvFormat
    dispatch_format: DispatchFormat
    backend: Backend
    num_experts: int
    topk: int
    hidden: int
    inner: int
    tokens: int
    seed: int

    def config(self) -> EpConfig:
        return EpConfig(
            num_experts=self.num_experts,
            topk=self.topk,
            hidden=self.hidden,
            max_tokens=self.tokens,
            num_chains=1,
            dispatch_format=self.dispatch_format,
            recv_format=self.recv_format,
            alignment=ROW_TILE if self.recv_format == "contiguous" else 1,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """path: which kernels ran; errors of the eager step and of replays, by number of tokens."""

    path: str
    eager: float
    replayed: dict[int, float]

    @property
    def worst(self) -> float:
        return max(self.eager, *self.replayed.values())


def moe_layer(
    buffer: Buffer,
    experts: Experts,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """dispatch -> experts -> combine: [T, H] bf16. Capturable where the experts are.

    Between the calls and their wait() another micro-batch may compute.
    """
    received = buffer.dispatch(x, topk_idx, topk_weights, num_tokens=num_tokens).wait()
    y = experts(received)
    return buffer.combine(y, received.handle).wait()


def run_rank(world: World, sizes: Sizes) -> Outcome:
    """One rank's part: the layer eagerly, then captured for two buckets and replayed."""
    rng = torch.Generator().manual_seed(sizes.seed)  # the same weights on every rank
    weights = random_weights(rng, sizes.num_experts, sizes.hidden, sizes.inner)
    rng.manual_seed(sizes.seed + 1 + world.rank)
    with Buffer(sizes.config(), world, sizes.backend) as buffer:
        mine = share_of(weights, world.rank, world.num_ranks, buffer.device)
        experts = EXPERTS[sizes.recv_format](mine, buffer.config, world.num_ranks)

        def inputs_of(tokens: int) -> dict[str, torch.Tensor]:
            scores = torch.rand(tokens, sizes.num_experts, generator=rng)
            drawn = {
                "x": torch.randn(tokens, sizes.hidden, generator=rng).bfloat16(),
                "experts": scores.topk(sizes.topk).indices,
                "weights": torch.rand(tokens, sizes.topk, generator=rng),
            }
            return {name: tensor.to(buffer.device) for name, tensor in drawn.items()}

        def error(inputs: dict[str, torch.Tensor], out: torch.Tensor) -> float:
            x, idx, weight = (inputs[name].cpu() for name in ("x", "experts", "weights"))
            exact = exact_layer(x, idx, weight, weights, sizes.dispatch_format)
            got = out[: len(x)].cpu()
            buffer.check()  # raises what the device recorded
            return exact.error(got)

        def step(
            inputs: dict[str, torch.Tensor], num_tokens: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            routed = (inputs["x"], inputs["experts"], inputs["weights"])
            return {"out": moe_layer(buffer, experts, *routed, num_tokens=num_tokens)}

        first = inputs_of(sizes.tokens)  # also compiles the kernels, before the capture
        eager = error(first, moe_layer(buffer, experts, *first.values()))
        buckets = sorted({max(1, sizes.tokens // 2), sizes.tokens})
        graphs = DecodeGraphs(buffer, step, inputs_of, buckets)
        replayed = {}
        for tokens in (sizes.tokens, max(1, sizes.tokens // 3)):  # the last one is padded
            inputs = inputs_of(tokens)
            replayed[tokens] = error(inputs, graphs.replay(inputs, tokens)["out"])
        return Outcome(experts.kernels.path, eager, replayed)


def main(recv_format: RecvFormat, argv: list[str] | None = None) -> int:
    """Parse, start the ranks, print what they found. Returns the exit status: 1 if wrong."""
    parser = argparse.ArgumentParser(description=f"A MoE layer over {recv_format!r} rows, checked.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--format", choices=("fp8", "bf16"), default="fp8", help="on the wire")
    parser.add_argument("--backend", choices=("auto", "cuda", "host"), default="auto")
    for name, default in (
        ("experts", 16), ("topk", 4), ("hidden", 512), ("inner", 256), ("tokens", 24), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(argv)
    sizes = Sizes(
        recv_format, given.format, given.backend, given.experts, given.topk, given.hidden,
        given.inner, given.tokens, given.seed,
    )  # fmt: skip
    try:
        outcomes = launch(run_rank, given.ranks, sizes, gpu_per_rank=True)
    except EpError as error:
        print(f"error: {error}")
        return 1
    worst = max(outcome.worst for outcome in outcomes)
    right = worst <= ERROR_LIMIT
    print(
        f"{recv_format}, {given.format} rows, {given.ranks} ranks: experts by"
        f" {outcomes[0].path}; largest error {worst:.1e} of the layer in FP64, eager and replayed:"
        f" {'right' if right else f'WRONG, the limit is {ERROR_LIMIT:g}'}"
    )
    return int(not right)
