"""`ep-runtime bench ...`: the benchmarks' own command lines, which `ep_runtime.bench` describes."""

from __future__ import annotations

import typer

from ep_runtime.bench import COMMANDS

app = typer.Typer(help="Benchmarks: correctness first, then time.", no_args_is_help=True)

# Everything after the command's name, --help too, is for the benchmark.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def pass_on(name: str, context: typer.Context) -> None:
    from ep_runtime.bench.__main__ import main

    raise typer.Exit(main([name, *context.args]))


@app.command("low-latency", help=COMMANDS["low-latency"], context_settings=PASS_ON)
def low_latency(context: typer.Context) -> None:
    pass_on("low-latency", context)


@app.command("normal", help=COMMANDS["normal"], context_settings=PASS_ON)
def normal(context: typer.Context) -> None:
    pass_on("normal", context)


@app.command("link", help=COMMANDS["link"], context_settings=PASS_ON)
def link(context: typer.Context) -> None:
    pass_on("link", context)


@app.command("compare", help=COMMANDS["compare"], context_settings=PASS_ON)
def compare(context: typer.Context) -> None:
    pass_on("compare", context)
