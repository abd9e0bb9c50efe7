"""Options of the benchmark, in Python and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ep_runtime.bench import link, low_latency, normal, out
from ep_runtime.bench.__main__ import main
from ep_runtime.bench.arguments import parse_link, parse_low_latency, parse_normal
from ep_runtime.bench.options import PEERS, LowLatencyOptions
from ep_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"tokens": ()}, "tokens"),
        ({"tokens": (0,)}, "tokens"),
        ({"experts": (4,)}, "experts"),
        ({"pairs": 0}, "pairs"),
        ({"replays": -1}, "replays"),
        ({"hidden": 100}, "hidden=100: .*multiple of 128"),
        ({"dispatch_formats": ("int8",)}, "dispatch_formats"),
        ({"recv_formats": ("sorted",)}, "recv_formats"),
        ({"modes": ("magic",)}, "modes"),
        ({"skew": "steep"}, "skew"),
        ({"peers": ("nothing",)}, "peers"),
        ({"backend": "tpu"}, "backend"),
        ({"tokens": (512,), "max_tokens": 128}, "max_tokens"),
        ({"backend": "host", "modes": ("hook",)}, "hook"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        LowLatencyOptions(**change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, 128), ({"tokens": (1, 512)}, 512), ({"tokens": (2,), "max_tokens": 4}, 4)],
)
def test_buffers_are_sized_for_the_largest_t_and_at_least_128(
    change: dict[str, Any], expected: int
) -> None:
    assert LowLatencyOptions(**change).buffer_tokens == expected


def test_auto_wants_every_peer_and_none_no_peer() -> None:
    assert all(LowLatencyOptions().wants(peer) for peer in PEERS)
    assert not any(LowLatencyOptions(peers=("none",)).wants(peer) for peer in PEERS)
    one = LowLatencyOptions(peers=("deep_ep",))
    assert [peer for peer in PEERS if one.wants(peer)] == ["deep_ep"]


def test_a_command_line_becomes_options() -> None:
    argv = "--tokens 1,8 --experts 32 --dispatch-formats fp8,bf16 --modes split --no-parts"
    argv += " --max-tokens 64 --link-gbs 369.5 --peers none --graph-mixing --out -"
    options = parse_low_latency(argv.split())
    expected = LowLatencyOptions(
        tokens=(1, 8),
        experts=(32,),
        dispatch_formats=("fp8", "bf16"),
        modes=("split",),
        parts=False,
        max_tokens=64,
        link_gbs=369.5,
        peers=("none",),
        graph_mixing=True,
        out=None,
        command=f"python -m ep_runtime.bench low-latency {argv}",
    )
    assert options == expected


def test_an_empty_command_line_is_the_default() -> None:
    command = "python -m ep_runtime.bench low-latency"
    assert parse_low_latency([]) == LowLatencyOptions(command=command)


def test_link_options() -> None:
    options = parse_link(["--num-bytes", "1024", "--out", "somewhere"])
    assert (options.num_bytes, options.out) == (1024, Path("somewhere"))
    with pytest.raises(ConfigError, match="repeats"):
        parse_link(["--repeats", "0"])


def test_a_wrong_command_says_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency"]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_wrong_option_ends_with_an_error_and_no_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["low-latency", "--tokens", "0"]) == 1
    assert "error: tokens=0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["low-latency", "normal", "link"])
def test_a_folder_that_cannot_be_made_is_told_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    for module in (low_latency, normal):
        monkeypatch.setattr(module, "launch", start)
    monkeypatch.setattr(link, "run", start)
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "results")
    assert main([name, "--out", place]) == 1
    told = capsys.readouterr().err
    assert f"error: out={place!r} cannot be made" in told
    assert "give --out" in told


def test_rank_alone_silences_nothing_and_torchruns_ranks_but_one_are_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name in place:
        monkeypatch.delenv(name, raising=False)
    assert out.is_first()
    monkeypatch.setenv("RANK", "1")
    assert out.is_first()
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert not out.is_first()
    out.make_folder(tmp_path / "results")
    assert not (tmp_path / "results").exists()
    monkeypatch.setenv("RANK", "0")
    out.make_folder(tmp_path / "results")
    assert out.is_first()
    assert (tmp_path / "results").is_dir()


@pytest.mark.parametrize("parse", [parse_low_latency, parse_normal])
def test_a_list_with_something_else_in_it_is_named(
    parse: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--tokens", "1,x"])
    assert "argument --tokens: '1,x' is no list of numbers" in capsys.readouterr().err
