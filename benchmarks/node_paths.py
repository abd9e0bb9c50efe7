"""What it costs to cross nodes: a dispatch and a combine by each way between nodes, in graphs.

    python -m benchmarks.node_paths --ranks 4 --ranks-per-node 2 --share-gpu

The ranks are processes on one host whose nodes are declared, not real: no network is measured, but
the same kernels run, and what they cost beside the flat operations is seen. With --share-gpu all
ranks are on one GPU, under an MPS daemon of this process's own. Every path is checked first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ep_runtime import env
from ep_runtime.bench.sharing import Plan, gpus_for
from ep_runtime.launch import launch
from ep_runtime.normal import NormalBuffer
from ep_runtime.normal.config import BetweenNodes
from ep_runtime.world import World

PATHS: tuple[BetweenNodes | None, ...] = (None, "flat", "direct", "puts", "nvshmem")
NVSHMEM = {  # ranks of one host, without a network
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
    "NVSHMEM_CUMEM_GRANULARITY": str(64 << 20),
}
REPEATS, REPLAYS = 4, 12


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes of a run, as argparse gives them."""

    ranks: int
    ranks_per_node: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    num_sms: int
    paths: tuple[str, ...]


def measure(world: World, options: Options) -> dict[str, dict[str, float]]:
    """On every rank: microseconds of its dispatch and its combine, by path."""
    torch.cuda.set_device(world.rank % torch.cuda.device_count())
    found: dict[str, dict[str, float]] = {}
    for path in PATHS:
        name = path or "no nodes"
        if name in options.paths:
            found[name] = _measure_path(world, options, path)
    return found


def _measure_path(world: World, options: Options, path: BetweenNodes | None) -> dict[str, float]:
    buffer = NormalBuffer(
        world,
        max_tokens=options.tokens,
        max_hidden=options.hidden,
        max_experts=options.experts,
        max_topk=options.topk,
        ranks_per_node=None if path is None else options.ranks_per_node,
        between_nodes=path or "auto",
    )
    device = buffer.device
    rng = torch.Generator(device).manual_seed(world.rank)
    x = torch.randn((options.tokens, options.hidden), device=device, generator=rng).bfloat16()
    scores = torch.rand((options.tokens, options.experts), device=device, generator=rng)
    idx = scores.topk(options.topk, dim=1).indices
    weights = torch.rand(idx.shape, device=device, generator=rng)
    worst = world.num_ranks * options.tokens

    def dispatch() -> object:
        return buffer.dispatch(
            x,
            idx,
            weights,
            num_experts=options.experts,
            num_worst_tokens=worst,
            num_sms=options.num_sms,
        )

    received = buffer.dispatch(x, idx, weights, num_experts=options.experts)
    y = received.x.clone()
    handle = received.handle
    out, _ = buffer.combine(y, handle)
    owners = torch.nn.functional.one_hot(
        idx // (options.experts // world.num_ranks), world.num_ranks
    )
    ranks = owners.amax(1).sum(1, keepdim=True)
    wrong = ((out.float() - x.float() * ranks).abs() > x.float().abs() * ranks * 2**-6).sum()
    if int(wrong):
        raise AssertionError(f"{path}: {int(wrong)} wrong elements on rank {world.rank}")
    times = {
        "dispatch": _time(world, dispatch),
        "combine": _time(
            world, lambda: buffer.combine(y, handle, out=out, num_sms=options.num_sms)
        ),
    }
    buffer.check()
    buffer.close()
    return times


def _time(world: World, run: Callable[[], object]) -> float:
    """Microseconds of one call, the median over replays of a graph of several."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    world.barrier()
    graph.replay()
    torch.cuda.synchronize()
    took = []
    for _ in range(REPLAYS):
        world.barrier()
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(1000 * begin.elapsed_time(end) / REPEATS)
    return float(statistics.median(took))


def main() -> None:
    """Print the slowest rank's medians, as a table and as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("ranks", 4),
        ("ranks-per-node", 2),
        ("tokens", 1024),
        ("hidden", 7168),
        ("topk", 8),
        ("experts", 256),
        ("num-sms", 24),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--paths", default=",".join(path or "no nodes" for path in PATHS))
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on one GPU, under MPS")
    given = vars(parser.parse_args())
    share = given.pop("share_gpu")
    options = Options(**{**given, "paths": tuple(given["paths"].split(","))})
    plan = Plan(options.ranks, options.ranks if share else 1, one_gpu=share)
    with env.defaults(NVSHMEM), gpus_for(plan):
        results = launch(measure, options.ranks, options)
    print(f"{'path':10s} {'dispatch':>10s} {'combine':>10s}   microseconds, slowest rank's median")
    for path in results[0]:
        worst = {op: max(one[path][op] for one in results) for op in ("dispatch", "combine")}
        print(f"{path:10s} {worst['dispatch']:10.1f} {worst['combine']:10.1f}")
        print(json.dumps({"path": path, **worst, **asdict(options)}))


if __name__ == "__main__":
    main()
