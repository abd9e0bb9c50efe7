"""`python -m ep_runtime.bench ...`: options from a command line, without the CLI's libraries."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ep_runtime.bench.link import LinkOptions
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.options import LowLatencyOptions

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


def parse_low_latency(argv: Sequence[str]) -> LowLatencyOptions:
    """Options of `low-latency`; lists are comma-separated. Exits with usage on unknown ones."""
    parser = argparse.ArgumentParser(
        prog="python -m ep_runtime.bench low-latency",
        description="Dispatch and combine at decode sizes: checked, then timed. Lists: 1,8,32.",
    )
    defaults = LowLatencyOptions()
    for name in _LISTS:
        shown = ",".join(map(str, getattr(defaults, name)))
        parser.add_argument(_flag(name), help=f"default: {shown}")
    for name, kind in _PLAIN.items():
        parser.add_argument(_flag(name), type=kind, help=f"default: {getattr(defaults, name)}")
    for name in _SWITCHES:
        parser.add_argument(_flag(name), action="store_true", default=None)
    parser.add_argument("--no-parts", dest="parts", action="store_false", default=None)
    parser.add_argument("--out", help=f"folder, or - for none; default: {defaults.out}")
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    _split_lists(parser, given, _LISTS)
    return LowLatencyOptions(**_with_out(given), command=command_line("low-latency", argv))


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


def parse_normal(argv: Sequence[str]) -> NormalOptions:
    """Options of `normal`; lists are comma-separated. Exits with usage on unknown ones."""
    parser = argparse.ArgumentParser(
        prog="python -m ep_runtime.bench normal",
        description="Dispatch and combine at prefill sizes: checked, then timed. Lists: 8,24,0.",
    )
    defaults = NormalOptions()
    for name in _NORMAL_LISTS:
        shown = ",".join(map(str, getattr(defaults, name)))
        parser.add_argument(_flag(name), help=f"default: {shown}")
    for name, kind in _NORMAL_PLAIN.items():
        parser.add_argument(_flag(name), type=kind, help=f"default: {getattr(defaults, name)}")
    for name in _NORMAL_SWITCHES:
        parser.add_argument(_flag(name), action="store_true", default=None)
    parser.add_argument("--out", help=f"folder, or - for none; default: {defaults.out}")
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    _split_lists(parser, given, _NORMAL_LISTS)
    return NormalOptions(**_with_out(given), command=command_line("normal", argv))


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


def parse_link(argv: Sequence[str]) -> LinkOptions:
    """Options of `link`."""
    parser = argparse.ArgumentParser(prog="python -m ep_runtime.bench link")
    defaults = LinkOptions()
    for name, kind in (("num_bytes", int), ("repeats", int), ("commit", str)):
        parser.add_argument(_flag(name), type=kind, help=f"default: {getattr(defaults, name)}")
    parser.add_argument("--out", help=f"folder, or - for none; default: {defaults.out}")
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    return LinkOptions(**_with_out(given))


def command_line(name: str, argv: Sequence[str]) -> str:
    """What to type to repeat a run."""
    return shlex.join(["python", "-m", "ep_runtime.bench", name, *argv])


def _with_out(given: dict[str, Any]) -> dict[str, Any]:
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
