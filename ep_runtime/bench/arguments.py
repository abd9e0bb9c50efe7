"""`python -m ep_runtime.bench ...`: options from a command line, without the CLI's libraries."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ep_runtime.bench import COMMANDS
from ep_runtime.bench.link import LINK_HELP, LinkOptions
from ep_runtime.bench.normal_options import NORMAL_HELP, NormalOptions
from ep_runtime.bench.options import DEFAULTS_IN_WORDS, HELP, LowLatencyOptions

_LISTS = {
    "tokens": int,
    "experts": int,
    "dispatch_formats": str,
    "combine_formats": str,
    "recv_formats": str,
    "modes": str,
    "peers": str,
}
_PLAIN: dict[str, type] = {
    "hidden": int,
    "topk": int,
    "ranks": int,
    "skew": str,
    "pairs": int,
    "replays": int,
    "input_sets": int,
    "backend": str,
    "num_sms": int,
    "max_tokens": int,
    "compute_us": float,
    "link_gbs": float,
    "label": str,
    "commit": str,
    "seed": int,
}
_SWITCHES = ("plot", "graph_mixing", "share_gpu")
_METAVARS: dict[type, str] = {int: "N", float: "X", str: "NAME"}


def low_latency_parser() -> argparse.ArgumentParser:
    """Of `low-latency`. What is not given comes out as None, as of the other parsers."""
    parser = _parser("low-latency", " Lists: 1,8,32.")
    _add(parser, LowLatencyOptions(), HELP, _LISTS, _PLAIN, _SWITCHES)
    no_parts = _told(HELP["no_parts"], False)
    parser.add_argument(
        "--no-parts", dest="parts", action="store_false", default=None, help=no_parts
    )
    return parser


def parse_low_latency(argv: Sequence[str]) -> LowLatencyOptions:
    """Options of `low-latency`; lists are comma-separated. Exits with usage on unknown ones."""
    parser = low_latency_parser()
    given = _given(parser, argv)
    _split_lists(parser, given, _LISTS)
    return LowLatencyOptions(**given, command=command_line("low-latency", argv))


_NORMAL_LISTS = {"tokens": int, "formats": str, "sms": int, "timings": str, "peers": str}
_NORMAL_PLAIN: dict[str, type] = {
    "hidden": int,
    "topk": int,
    "num_experts": int,
    "ranks": int,
    "skew": str,
    "repeats": int,
    "replays": int,
    "backend": str,
    "link_gbs": float,
    "label": str,
    "commit": str,
    "seed": int,
}
_NORMAL_SWITCHES = ("plot", "share_gpu")


def normal_parser() -> argparse.ArgumentParser:
    """Of `normal`."""
    parser = _parser("normal", " Lists: 8,24,0.")
    options = NormalOptions()
    _add(parser, options, NORMAL_HELP, _NORMAL_LISTS, _NORMAL_PLAIN, _NORMAL_SWITCHES)
    return parser


def parse_normal(argv: Sequence[str]) -> NormalOptions:
    """Options of `normal`; lists are comma-separated. Exits with usage on unknown ones."""
    parser = normal_parser()
    given = _given(parser, argv)
    _split_lists(parser, given, _NORMAL_LISTS)
    return NormalOptions(**given, command=command_line("normal", argv))


def _split_lists(
    parser: argparse.ArgumentParser, given: dict[str, Any], kinds: Mapping[str, type]
) -> None:
    """Texts of lists into tuples, in place. Exits with usage on an entry of another kind."""
    for name, kind in kinds.items():
        parts = [part for part in given.get(name, "").split(",") if part]
        try:
            values = tuple(kind(part) for part in parts)
        except ValueError as error:
            parser.error(f"argument {_flag(name)}: {given[name]!r} is no list of numbers: {error}")
        if name in given:
            given[name] = values


def link_parser() -> argparse.ArgumentParser:
    """Of `link`."""
    parser = _parser("link")
    _add(parser, LinkOptions(), LINK_HELP, {}, {"num_bytes": int, "repeats": int, "commit": str})
    return parser


def parse_link(argv: Sequence[str]) -> LinkOptions:
    """Options of `link`."""
    return LinkOptions(**_given(link_parser(), argv))


def command_line(name: str, argv: Sequence[str]) -> str:
    """What to type to repeat a run."""
    return shlex.join(["python", "-m", "ep_runtime.bench", name, *argv])


def _parser(name: str, more: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m ep_runtime.bench {name}",
        description=COMMANDS[name] + more,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
    )


def _add(
    parser: argparse.ArgumentParser,
    defaults: LowLatencyOptions | NormalOptions | LinkOptions,
    meanings: Mapping[str, str],
    lists: Mapping[str, type],
    plain: Mapping[str, type],
    switches: Sequence[str] = (),
) -> None:
    """A flag for every name, and --out."""

    def told(name: str) -> str:
        return _told(meanings[name], getattr(defaults, name), DEFAULTS_IN_WORDS.get(name))

    for name, kind in lists.items():
        kinds = f"{_METAVARS[kind]},.."
        parser.add_argument(_flag(name), metavar=kinds, help=told(name))
    for name, kind in plain.items():
        parser.add_argument(_flag(name), type=kind, metavar=_METAVARS[kind], help=told(name))
    for name in switches:
        parser.add_argument(_flag(name), action="store_true", default=None, help=told(name))
    parser.add_argument("--out", metavar="FOLDER", help=told("out"))


def _told(meaning: str, default: object, in_words: str | None = None) -> str:
    """A meaning and its default, as typer shows the other commands' (words in parentheses)."""
    if in_words is not None or isinstance(default, bool):
        return f"{meaning} [default: ({in_words or 'off'})]"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{meaning} [default: {shown}]"


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What the command line says, by name of the option."""
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    if "out" in given:
        given["out"] = None if given["out"] == "-" else Path(given["out"])
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Every option has a flag, or this module would silently leave it out.
_COVERED = {*_LISTS, *_PLAIN, *_SWITCHES, "parts", "out", "command"}
if missing := {f.name for f in fields(LowLatencyOptions)} ^ _COVERED:
    raise TypeError(f"options and flags differ in {sorted(missing)}; add them to arguments.py")
_NORMAL_COVERED = {*_NORMAL_LISTS, *_NORMAL_PLAIN, *_NORMAL_SWITCHES, "out", "command"}
if missing := {f.name for f in fields(NormalOptions)} ^ _NORMAL_COVERED:
    raise TypeError(f"options and flags differ in {sorted(missing)}; add them to arguments.py")
