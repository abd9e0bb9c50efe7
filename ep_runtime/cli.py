"""The command `ep-runtime`. Each command imports what it needs: `--help` loads no torch."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ep_runtime import __version__, cli_bench, env, logs
from ep_runtime.bench.options import BACKEND, HELP
from ep_runtime.bench.out import is_first
from ep_runtime.errors import ConfigError, EpError

if TYPE_CHECKING:
    from ep_runtime.decoding import DecodeResult

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_bench.app, name="bench")


class Backend(str, Enum):
    """Values of --backend."""

    auto = "auto"
    host = "host"
    cuda = "cuda"
    virtual = "virtual"


class Wire(str, Enum):
    """Values of --wire."""

    bf16 = "bf16"
    fp8 = "fp8"


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"ep_runtime {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say it and end."),
    ] = False,
) -> None:
    """Expert-parallel dispatch and combine for MoE models, made for CUDA-graph replay."""


def main() -> None:
    """Entry point: what this package raises on purpose becomes one line and exit status 1."""
    try:
        logs.start()
        app()
    except EpError as error:
        sys.stdout.flush()
        kind = type(error).__name__
        print(f"ep-runtime: {kind}: {error}", file=sys.stderr)
        sys.exit(1)


def read_prompts(given: list[str], file: Path | None) -> tuple[str, ...]:
    """Prompts of the options, then the lines of the file that are not blank ('-': stdin)."""
    prompts = list(given)
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {file}: {error}; give a UTF-8 text file") from error
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"--prompt-file {file}: no line with text; give one prompt per line")
        prompts += lines
    return tuple(prompts)


@app.command()
def decode(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; give it again for more.", show_default="prompts of its own"),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="A text file, one prompt per line; - for standard input.", show_default="none"
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks; the model's number of experts is a multiple of them.",
            show_default="torchrun's, else one per GPU, or 4 virtual or CPU ranks",
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help=f"{BACKEND}; virtual: many ranks of one process on GPUs.")
    ] = Backend.auto,
    tokens: Annotated[int, typer.Option(help="Bytes to decode after each prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences a rank decodes at once.")] = 8,
    microbatches: Annotated[int, typer.Option(help="Parts of a batch that overlap: 1 or 2.")] = 1,
    wire: Annotated[Wire, typer.Option(help=HELP["dispatch_formats"])] = Wire.bf16,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the sampling; 0: always the likeliest byte.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, where temperature > 0.")] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare every token with the single-rank reference.",
            show_default="off",
        ),
    ] = False,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Run the steps once more without graphs, for their time.",
            show_default="off",
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of another model, a safetensors file.",
            show_default="the one that ships",
        ),
    ] = None,
) -> None:
    """Generate text with a small MoE language model over expert-parallel ranks."""
    from ep_runtime import decoding
    from ep_runtime.lm.check import Sampling
    from ep_runtime.lm.job import DecodeJob

    plan = decoding.make_plan(backend.value, ranks)
    prompts = read_prompts(prompt or [], prompt_file) or decoding.DEFAULT_PROMPTS
    job = DecodeJob(
        prompts=tuple(text.encode() for text in prompts),
        num_tokens=tokens,
        batch=batch,
        microbatches=microbatches,
        dispatch_format=wire.value,
        checkpoint=checkpoint,
        sampling=Sampling(temperature, seed),
        check=check,
        stream=True,
    )
    speaks = is_first()
    if speaks:
        print(f"backend {plan.kind}, {plan.num_ranks} ranks: {plan.reason}\n", flush=True)
    result = decoding.decode(job, plan, repeat_eagerly=eager)
    if speaks:
        show_decoded(result, on_graphs=plan.kind != "host")
    verdict = result.report.check
    if verdict is not None and not verdict.ok:
        raise typer.Exit(1)
    if result.eager is not None and result.eager.generated != result.report.generated:
        print("ep-runtime: the eager run decoded other tokens than the graphs", file=sys.stderr)
        raise typer.Exit(1)


def show_decoded(result: DecodeResult, *, on_graphs: bool) -> None:
    """The other prompts' texts, the table, and the check."""
    from rich.console import Console

    from ep_runtime.cli_tables import decode_table

    print()
    for text in result.report.texts[1:]:
        print(f"\n{text}")
    print()
    Console(highlight=False).print(decode_table(result, on_graphs=on_graphs))
    if result.report.check is not None:
        print(f"check: {result.report.check}")


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, not tables.", show_default="off")
    ] = False,
) -> None:
    """What this machine can run, and what to do about the rest."""
    from ep_runtime import doctor as examination

    able, findings = examination.abilities(), examination.examine()
    if as_json:
        parts = {"abilities": able, "findings": findings}
        listed = {name: [dataclasses.asdict(f) for f in part] for name, part in parts.items()}
        print(json.dumps(listed, indent=2))
    else:
        from rich.console import Console

        from ep_runtime.cli_tables import finding_table

        console = Console(highlight=False)
        console.print(finding_table("this machine runs", able))
        console.print()
        console.print(finding_table("examined", findings))
    if all(finding.status != "ok" for finding in able):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Version, build, limits and environment variables."""
    from ep_runtime.native import _C

    backends = f"host and CUDA (sm_{_C.cuda_archs})" if _C.has_cuda else "host"
    print(f"ep_runtime {__version__}, backends: {backends}; {_C.build_info}")
    print("limits: " + ", ".join(f"{name} {value}" for name, value in _C.limits().items()))
    print("\nenvironment variables (default): meaning")
    for name, default, meaning in env.documentation():
        print(f"  {name} ({default or 'unset'}): {meaning}")


@app.command()
def tune(
    ranks: Annotated[int, typer.Option(help=HELP["ranks"])] = 0,
    tokens: Annotated[int, typer.Option(help=HELP["tokens"])] = 4096,
    hidden: Annotated[int, typer.Option(help=HELP["hidden"])] = 7168,
    path: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="EP_TUNED, or in ~/.cache/ep_runtime"),
    ] = None,
) -> None:
    """Measure how many SMs the normal operations need here; buffers built later use it."""
    from rich.console import Console

    from ep_runtime.bench import tune as tuning
    from ep_runtime.bench.normal_options import NormalOptions

    options = NormalOptions(ranks=ranks, tokens=(tokens,), hidden=hidden, sms=tuning.SMS)
    raise typer.Exit(tuning.main(options, path, Console()))
