"""What `make scale-test` plans for a number of GPUs, and how it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from bench_records import timed

from benchmarks import scale_test
from benchmarks.scale_test import Request, draw_missing_plots, main, notes, plan, select
from benchmarks.timed_parts import Part
from ep_runtime.bench.arguments import parse_low_latency
from ep_runtime.bench.records import write_records

CHECKOUT = Path(__file__).resolve().parents[2]
NAMES = ["suite", "alone", "replay", "low-latency", "normal", "large", "more"]


def parts_of(gpus: int, *, with_normal: bool = True) -> dict[str, Part]:
    parts = plan(Request(gpus=gpus, with_normal=with_normal))
    assert [part.name for part in parts] == NAMES
    assert sum(part.share_s for part in parts) < scale_test.TOTAL_S - scale_test.SPARE_S
    return {part.name: part for part in parts}


DECODE, LARGE = "1,8,32,64,128", "512,1024"


@pytest.mark.parametrize(("gpus", "ranks"), [(1, "2"), (2, "2"), (4, "4"), (8, "8")])
def test_benchmarks_have_a_rank_on_every_gpu(gpus: int, ranks: str) -> None:
    parts = parts_of(gpus)
    for name, tokens, experts in (
        ("low-latency", DECODE, 256),
        ("large", LARGE, 256),
        ("more", DECODE, 288),
    ):
        command = parts[name].command
        assert command[:5] == (sys.executable, "-m", "ep_runtime", "bench", "low-latency")
        options = parse_low_latency(command[5:])
        assert options.ranks == int(ranks)
        assert ",".join(map(str, options.tokens)) == tokens
        assert (options.experts, options.topk, options.hidden) == ((experts,), 8, 7168)
        assert (options.plot, options.wants("deep_ep")) == (True, name != "more")
    assert not any(part.skip for part in parts.values())


def test_runs_of_low_latency_write_to_different_files() -> None:
    parts = parts_of(8)
    names = ("low-latency", "large", "more")
    labels = [parse_low_latency(parts[n].command[5:]).label for n in names]
    assert labels == ["scale", "scale-large", "scale-more"]


@pytest.mark.parametrize(
    ("gpus", "marked"),
    [
        (1, ["gpu and not alone and not multi", "alone", "gpu and not multi"]),
        (2, ["multi and not alone", "alone and multi", "multi"]),
    ],
)
def test_tests_are_chosen_by_the_number_of_gpus(gpus: int, marked: list[str]) -> None:
    parts = parts_of(gpus)
    commands = [parts[name].command for name in ("suite", "alone", "replay")]
    assert [command[command.index("--require-gpu") + 2] for command in commands] == marked
    ignored = f"--ignore={scale_test.REPLAY_TEST}"
    assert [ignored in command for command in commands] == [True, True, False]
    assert scale_test.REPLAY_TEST in commands[2]


def test_workers_of_all_gpus_share_only_tests_that_may_run_side_by_side() -> None:
    parts = {part.name: part for part in plan(Request(gpus=4, with_normal=True, workers=24))}
    assert [name for name, part in parts.items() if "-n" in part.command] == ["suite"]
    command = parts["suite"].command
    assert command[command.index("-n") + 1] == "3"


def test_every_folder_with_tests_is_in_the_suite() -> None:
    assert (CHECKOUT / scale_test.REPLAY_TEST).exists()
    folders = {f"tests/{file.parent.name}" for file in (CHECKOUT / "tests").glob("*/test_*.py")}
    assert set(scale_test.FIRST_TESTS) <= folders

    def chosen(part: str) -> set[str]:
        return {word for word in parts_of(8)[part].command if word.startswith("tests/")}

    assert chosen("suite") == folders
    assert chosen("alone") == folders - {scale_test.BENCH_TESTS}


def test_experts_that_do_not_divide_are_left_out_and_named() -> None:
    request = Request(gpus=6, with_normal=True)
    why = "E=256 is no multiple of 6 ranks"
    assert f"left out: {why}" in notes(request)
    skipped = {part.name: part.skip for part in plan(request) if part.skip}
    assert skipped == {"low-latency": why, "normal": why, "large": why}


def test_a_build_without_normal_says_so() -> None:
    assert "no command `normal`" in parts_of(2, with_normal=False)["normal"].skip


def test_one_gpu_is_said_to_be_shared() -> None:
    assert notes(Request(gpus=1, with_normal=True, workers=6)) == [
        "2 ranks share the GPU under MPS: no link is measured"
    ]


def test_tests_without_workers_are_said_to_be_slow() -> None:
    assert any("no pytest-xdist" in note for note in notes(Request(gpus=2, with_normal=True)))


def test_parts_are_selected_by_name() -> None:
    parts = list(parts_of(2).values())
    assert select(parts, "") == parts
    chosen = select(parts, "large,replay")
    assert [part.name for part in chosen if not part.skip] == ["replay", "large"]
    with pytest.raises(ValueError, match=r"--only nothing: the parts are suite, alone, replay"):
        select(parts, "replay,nothing")


def fake_parts(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
    """Python scripts instead of the real commands, on a machine said to have two GPUs."""
    parts = [
        Part(name=f"part-{i}", command=(sys.executable, "-c", script), share_s=5.0)
        for i, script in enumerate(scripts)
    ]
    monkeypatch.setattr(scale_test, "plan", lambda _: parts)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def run(tmp_path: Path, *options: str) -> int:
    return main(["--out", str(tmp_path), "--logs", str(tmp_path / "logs"), *options])


def test_the_exit_status_is_1_if_any_part_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_parts(monkeypatch, "print('fine')", "raise SystemExit(5)", "print('fine too')")
    assert run(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("part "))) :]
    assert [line.split()[:3:2] for line in table[1:4]] == [
        ["part-0", "passed"],
        ["part-1", "failed"],
        ["part-2", "passed"],
    ]
    assert run(tmp_path, "--only", "part-0,part-2") == 0


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_parts(monkeypatch, "raise SystemExit(1)")
    assert run(tmp_path, "--dry-run", "--gpus", "8") == 0
    assert capsys.readouterr().out.startswith("GPUs: 8, ranks: 8; ")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "--gpus is for --dry-run"),
        (["--only", "nothing"], "the parts are"),
        (["--seconds", "5"], "give more than 16"),
    ],
)
def test_a_wrong_command_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    fake_parts(monkeypatch, "raise SystemExit(1)")
    assert run(tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(tmp_path) == 2
    assert "0 GPUs here; --dry-run --gpus 8" in capsys.readouterr().err


def test_results_of_a_run_that_was_ended_get_their_plot(tmp_path: Path) -> None:
    """Only those of this run, and only where the benchmark did not draw them itself."""
    names = ["scale", "scale-large", "scale-old", "other"]
    paths = {name: tmp_path / f"low-latency-gpu-r2-{name}.json" for name in names}
    for path in paths.values():
        write_records(path, [timed(1.0)])
    os.utime(paths["scale-old"], (1.0, 1.0))
    since = paths["scale"].stat().st_mtime - 10.0
    paths["scale-large"].with_suffix(".png").write_bytes(b"drawn by its run")
    stale = paths["scale"].with_suffix(".png")
    stale.write_bytes(b"of an earlier run")
    os.utime(stale, (1.0, 1.0))
    assert draw_missing_plots(tmp_path, "scale", since) == [stale]
    assert stale.read_bytes().startswith(b"\x89PNG")
    assert paths["scale-large"].with_suffix(".png").read_bytes() == b"drawn by its run"
