"""`ep-runtime bench ...`: command lines of the benchmarks. The work is in `ep_runtime.bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ep_runtime.errors import ConfigError

app = typer.Typer(help="Benchmarks: correctness first, then time.", no_args_is_help=True)


def words(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')"""
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """'1,8' -> (1, 8). Raises ConfigError for what is no integer."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise ConfigError(f"--{option} {text!r}: give integers, such as 1,8,32") from None


@app.callback()
def group() -> None:
    """Benchmarks: correctness first, then time."""


@app.command("low-latency")
def low_latency(
    tokens: Annotated[str, typer.Option(help="T: tokens per rank.")] = "1,8,32,64,128",
    hidden: Annotated[int, typer.Option(help="H")] = 7168,
    topk: Annotated[int, typer.Option(help="K")] = 8,
    experts: Annotated[str, typer.Option(help="E: experts of all ranks.")] = "256,32",
    ranks: Annotated[int, typer.Option(help="0: every GPU, or 2 CPU processes.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, cuda or host")] = "auto",
    dispatch: Annotated[str, typer.Option(help="Formats on the wire: fp8,bf16")] = "fp8",
    recv: Annotated[str, typer.Option(help="batched,compact,contiguous")] = "batched,compact",
    modes: Annotated[str, typer.Option(help="fused,split,hook")] = "fused",
    skew: Annotated[str, typer.Option(help="uniform, zipf, one-rank or half-empty")] = "uniform",
    peers: Annotated[str, typer.Option(help="auto, none, or names to compare with")] = "auto",
    parts: Annotated[bool, typer.Option(help="Also time dispatch and combine apart.")] = True,
    pairs: Annotated[int, typer.Option(help="Dispatch-combine pairs in one graph.")] = 50,
    replays: Annotated[int, typer.Option(help="Timed replays of that graph.")] = 20,
    input_sets: Annotated[int, typer.Option(help="Inputs that the pairs rotate through.")] = 4,
    num_sms: Annotated[int, typer.Option(help="SMs of our kernels; 0: all.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(help="M [default: largest T, at least 128]")
    ] = None,
    compute_us: Annotated[float, typer.Option(help="Other work in mode hook.")] = 20.0,
    link_gbs: Annotated[
        float | None, typer.Option(help="GB/s one way of the link [default: measured]")
    ] = None,
    graph_mixing: Annotated[bool, typer.Option(help="NCCL's graph mixing support.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSON.")] = Path("benchmarks/results"),
    save: Annotated[bool, typer.Option(help="Write JSON (and plot) there.")] = True,
    plot: Annotated[bool, typer.Option(help="Draw a plot as well.")] = False,
    seed: Annotated[int, typer.Option(help="Of inputs and routes.")] = 0,
) -> None:
    """Dispatch and combine at decode sizes, beside every peer that is installed."""
    from ep_runtime.bench.low_latency import main
    from ep_runtime.bench.options import LowLatencyOptions

    options = LowLatencyOptions(
        tokens=numbers("tokens", tokens),
        hidden=hidden,
        topk=topk,
        experts=numbers("experts", experts),
        ranks=ranks,
        backend=backend,  # type: ignore[arg-type] # checked by the options themselves
        dispatch_formats=words(dispatch),
        recv_formats=words(recv),
        modes=words(modes),  # type: ignore[arg-type]
        skew=skew,  # type: ignore[arg-type]
        peers=words(peers),
        parts=parts,
        pairs=pairs,
        replays=replays,
        input_sets=input_sets,
        num_sms=num_sms,
        max_tokens=max_tokens,
        compute_us=compute_us,
        link_gbs=link_gbs,
        graph_mixing=graph_mixing,
        out=out if save else None,
        plot=plot,
        command=shlex.join(["ep-runtime", *sys.argv[1:]]),
        seed=seed,
    )
    raise typer.Exit(main(options))
