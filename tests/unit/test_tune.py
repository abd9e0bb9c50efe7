"""Tuned SM counts: what is chosen, written, read, and refused."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ep_runtime.bench import normal
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_records import NormalRecord
from ep_runtime.bench.records import Machine
from ep_runtime.bench.tune import choose, main
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.normal.tuned import TunedSms, tuned_num_sms, tuned_path, write_tuned

MACHINE = Machine(
    device="GPU X",
    backend="cuda",
    commit="",
    command="",
    torch="",
    cuda="",
    nccl="",
    environment="",
)


def record(op: str, num_sms: int, us: float | None, **more: Any) -> NormalRecord:
    values: dict[str, Any] = {
        "timing": "graph",
        "dispatch_format": "bf16",
        "num_ranks": 2,
        "ranks_per_gpu": 1,
        "num_tokens": 4096,
        "hidden": 7168,
        "topk": 8,
        "num_experts": 256,
        "skew": "uniform",
        "repeats": 10,
        "replays": 20,
        "recv_bytes": 1.0,
        "link_bytes": 1.0,
        "link_gbs": None,
    }
    return NormalRecord(
        machine=MACHINE, impl="ep_runtime", op=op, num_sms=num_sms, median_us=us, **(values | more)
    )


def test_the_fewest_sms_that_are_nearly_as_fast_are_chosen() -> None:
    records = [
        *(record("dispatch", sms, us) for sms, us in ((8, 330.0), (16, 190.0), (24, 186.0))),
        *(
            record("dispatch", sms, us, dispatch_format="fp8")
            for sms, us in ((8, 200.0), (16, 120.0), (24, 100.0))
        ),
        *(record("combine", sms, us) for sms, us in ((8, 205.0), (16, 200.0), (24, 199.0))),
    ]
    assert choose(records) == TunedSms(dispatch=24, combine=8)  # fp8 needs 24


def both(times: dict[tuple[str, int], float]) -> list[NormalRecord]:
    """Records of both operations from {(format, SMs): us}."""
    return [
        record(op, sms, us, dispatch_format=wire)
        for op in ("dispatch", "combine")
        for (wire, sms), us in times.items()
    ]


def test_a_count_is_close_enough_in_every_format() -> None:
    # FP8 is fastest with 24, which is too slow for BF16; nothing but 32 suits both.
    bf16 = {("bf16", 24): 120.0, ("bf16", 32): 101.0, ("bf16", 64): 100.0}
    fp8 = {("fp8", 24): 100.0, ("fp8", 32): 104.0, ("fp8", 64): 130.0}
    assert choose(both(bf16 | fp8)) == TunedSms(32, 32)


def test_where_no_count_suits_all_the_one_that_loses_least_is_chosen() -> None:
    # Fewest that suit each alone: 32 and 24; with 32, FP8 would take 1.67 times its best.
    bf16 = {("bf16", 24): 105.5, ("bf16", 32): 101.0, ("bf16", 64): 100.0}
    fp8 = {("fp8", 24): 60.0, ("fp8", 32): 100.0, ("fp8", 64): 100.0}
    assert choose(both(bf16 | fp8)) == TunedSms(24, 24)


def test_a_count_that_was_not_measured_everywhere_is_not_chosen() -> None:
    times = {("bf16", 8): 100.0, ("bf16", 16): 100.0, ("fp8", 16): 100.0}
    assert choose(both(times)) == TunedSms(16, 16)


def test_nothing_is_chosen_from_a_run_that_failed() -> None:
    bad = record("dispatch", 8, None, status="wrong", reason="rows differ")
    with pytest.raises(BuildError, match="rows differ"):
        choose([record("combine", 8, 1.0), bad])
    with pytest.raises(BuildError, match="combine was not measured"):
        choose([record("dispatch", 8, 1.0)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for a machine with one kind of GPU; the file that buffers read."""
    path = tmp_path / "deep" / "tuned.json"
    monkeypatch.setenv("EP_TUNED", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "GPU X")
    return path


def test_what_was_written_is_read_for_its_gpu_and_ranks(gpu: Path) -> None:
    assert tuned_path() == gpu
    assert tuned_num_sms(2) == TunedSms()  # no file yet
    write_tuned(gpu, "GPU X", 2, TunedSms(20, 16))
    write_tuned(gpu, "GPU X", 8, TunedSms(12, 8))
    write_tuned(gpu, "GPU Y", 2, TunedSms(4, 4))
    assert tuned_num_sms(2) == TunedSms(20, 16)
    assert tuned_num_sms(8) == TunedSms(12, 8)
    assert tuned_num_sms(4) == TunedSms()
    assert tuned_num_sms(2, torch.device("cpu")) == TunedSms()


def writes(path: Path, many: int, writer: int) -> None:
    for ranks in range(many):
        write_tuned(path, f"GPU {writer}", ranks, TunedSms(writer, ranks))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        list(pool.map(partial(writes, path, 100), range(2)))  # raises what they raised
    entries = json.loads(path.read_text())
    assert {name: len(of_gpu) for name, of_gpu in entries.items()} == {"GPU 0": 100, "GPU 1": 100}
    assert {found.name for found in tmp_path.iterdir()} == {"tuned.json", "tuned.json.lock"}


@pytest.mark.parametrize(
    ("gpus", "ranks", "measured"), [(1, 0, False), (2, 3, False), (2, 2, True)]
)
def test_what_ranks_that_share_a_gpu_measure_is_not_written(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int, measured: bool
) -> None:
    ran = []

    def run(options: NormalOptions) -> list[NormalRecord]:
        ran.append(options)  # a GPU that torchrun's ranks share is only seen by them
        return [record(op, 8, 1.0, ranks_per_gpu=2) for op in ("dispatch", "combine")]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(normal, "run", run)
    with pytest.raises(BuildError, match="share a GPU"):
        main(NormalOptions(ranks=ranks), None, Console())
    assert bool(ran) is measured
    assert not gpu.exists()


@pytest.fixture
def unnamed(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same machine, whose user did not say where the file is."""
    monkeypatch.delenv("EP_TUNED")
    return gpu


def test_a_user_without_a_home_directory_gets_the_defaults(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert tuned_num_sms(2) == TunedSms()
    assert tuned_num_sms(2, default=TunedSms(4, 4)) == TunedSms(4, 4)


def test_a_home_that_is_no_directory_gives_the_defaults(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    assert tuned_num_sms(2) == TunedSms()
    monkeypatch.setenv("EP_TUNED", str(tuned_path()))  # but who asks for a file means it
    with pytest.raises(ConfigError, match="Not a directory"):
        tuned_num_sms(2)


def test_a_home_of_somebody_else_gives_the_defaults(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(_path: Path) -> str:  # root, which tests may be, is denied nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", read_text)
    assert tuned_num_sms(2) == TunedSms()


def test_a_damaged_file_in_the_cache_is_refused_as_well(
    unnamed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tuned_path().parent.mkdir(parents=True)
    tuned_path().write_text("{")
    with pytest.raises(ConfigError, match=str(tuned_path())):
        tuned_num_sms(2)


@pytest.mark.parametrize("sms", [{"dispatch": 0, "combine": 8}, {"dispatch": 8, "combine": -1}])
def test_a_file_with_less_than_one_sm_is_refused(gpu: Path, sms: dict[str, int]) -> None:
    gpu.parent.mkdir()
    gpu.write_text(json.dumps({"GPU X": {"2": sms}}))
    with pytest.raises(ConfigError, match=f"{gpu}.*at least 1 SM"):
        tuned_num_sms(2)


@pytest.mark.parametrize("text", ["{", "[]", '{"GPU X": {"2": {"dispatch": 8}}}'])
def test_a_damaged_file_is_refused(gpu: Path, text: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(text)
    with pytest.raises(ConfigError, match="EP_TUNED"):
        tuned_num_sms(2)


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match="no GPU"):
        main(NormalOptions(), None, Console())
