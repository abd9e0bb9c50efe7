"""What `expected_tokens` is worth, and what it costs where it is wrong.

    python -m benchmarks.expected_tokens                 # two GPUs, one process each

A pair as deep_ep's callers make it (FP8 rows with scales column by column, weights that come with
the combine), 50 of them in a CUDA graph, on ranks that send equally many tokens and on ranks that
do not. Launches are sized for max_tokens, as without a word; for the rank's own tokens, as with
EP_EVEN_TOKENS=1; and for its own but at least a part of max_tokens. Results are checked first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist

from ep_runtime.bench.clock import CudaClock, Mark
from ep_runtime.bench.process_group import (
    device_barrier,
    set_environment,
    shared_store,
    start_group,
)
from ep_runtime.bench.stats import slowest_rank
from ep_runtime.buffer import Buffer
from ep_runtime.config import EpConfig
from ep_runtime.launch import launch
from ep_runtime.receive import ReceiveBuffer
from ep_runtime.world import World

CONFIG = EpConfig(
    num_experts=256, topk=8, hidden=7168, max_tokens=128, num_chains=1, dispatch_format="bf16"
)
Tokens = tuple[int, int]  # of each rank
EVEN: tuple[Tokens, ...] = tuple((tokens, tokens) for tokens in (1, 4, 8, 16, 32, 64, 128))
UNEVEN: tuple[Tokens, ...] = ((1, 32), (1, 128), (8, 128), (32, 128), (0, 8), (0, 128))
PAIRS, REPLAYS = 50, 20
LIMIT = 0.1  # of x: e4m3 rounds by 1/16 at most, BF16 adds little

SIZED: dict[str, Callable[[int], int]] = {
    "max_tokens": lambda _own: CONFIG.max_tokens,
    "own": lambda own: own,
    "at least a quarter": lambda own: max(own, CONFIG.max_tokens // 4),
    "at least an eighth": lambda own: max(own, CONFIG.max_tokens // 8),
}


def measure(world: World) -> dict[tuple[Tokens, str], list[float]]:
    """On every rank: microseconds of a pair, one for each replay, by tokens and way of sizing."""
    device = torch.device("cuda", world.rank)
    torch.cuda.set_device(device)
    set_environment(graph_mixing=False)
    start_group(shared_store(world), world.rank, world.num_ranks, device, nccl=True)
    clock = CudaClock(world.barrier, device_barrier(device))
    found = {}
    with Buffer(CONFIG, world, "cuda") as buffer:
        buffer.steady()
        into = buffer.new_receive(dispatch_format="fp8", column_major_scales=True)
        for tokens in EVEN + UNEVEN:
            for name, sized in SIZED.items():
                expected = sized(tokens[world.rank])
                pair = _pair(buffer, into, tokens[world.rank], expected)
                world.barrier()
                times = clock.periods(pair, REPLAYS)
                buffer.check()
                found[tokens, name] = [time / PAIRS for time in times]
    dist.destroy_process_group()
    return found


def _pair(
    buffer: Buffer, into: ReceiveBuffer, tokens: int, expected: int
) -> Callable[[Mark], None]:
    """A body for the clock. Runs once here, and raises AssertionError where the sum is wrong."""
    device, config = buffer.device, buffer.config
    rng = torch.Generator(device).manual_seed(1000 * buffer.rank + tokens)
    x = torch.randn((tokens, config.hidden), device=device, generator=rng).bfloat16()
    scores = torch.rand((tokens, config.num_experts), device=device, generator=rng)
    idx = scores.topk(config.topk, dim=1).indices
    weights = torch.rand(idx.shape, device=device, generator=rng)
    out = torch.full_like(x, float("nan"))
    received = buffer.dispatch_fused(x, idx, out=into, expected_tokens=expected)
    assert received.scales is not None
    groups = received.x.float().view(*received.scales.shape, -1)
    y = (groups * received.scales.unsqueeze(3)).view(received.x.shape).bfloat16()
    buffer.combine_fused(y, received.handle, topk_weights=weights, out=out)
    torch.cuda.synchronize(device)
    buffer.check()
    wanted = x.float() * weights.sum(1, keepdim=True)
    wrong = int((~((out.float() - wanted).abs() <= LIMIT * wanted.abs() + 1e-3)).sum())
    if wrong:
        raise AssertionError(f"rank {buffer.rank}, {tokens} tokens: {wrong} wrong elements")

    def body(_mark: Mark) -> None:
        for _ in range(PAIRS):
            received = buffer.dispatch_fused(x, idx, out=into, expected_tokens=expected)
            buffer.combine_fused(y, received.handle, topk_weights=weights, out=out)

    return body


def main() -> None:
    """Print median (min-max) of the replays, each counted with its slowest rank."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = launch(measure, 2, gpu_per_rank=True)
    print(f"{torch.cuda.get_device_name()}: us of a pair, launches sized for\n")
    print(f"{'tokens':>10s}" + "".join(f"{name:>24s}" for name in SIZED))
    for tokens in EVEN + UNEVEN:
        cells = []
        for name in SIZED:
            found = slowest_rank([one[tokens, name] for one in results])
            cells.append(f"{found.median_us:.1f} ({found.min_us:.1f}-{found.max_us:.1f})")
        row = "/".join(map(str, tokens))
        print(f"{row:>10s}" + "".join(f"{cell:>24s}" for cell in cells))


if __name__ == "__main__":
    main()
