"""Tuned SM counts: what is chosen, written, read, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("text", ["{", "[]", '{"GPU X": {"2": {"dispatch": 8}}}'])
def test_a_damaged_file_is_refused(gpu: Path, text: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(text)
    with pytest.raises(ConfigError, match="EP_TUNED"):
        tuned_num_sms(2)


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from ep_runtime.bench.normal_options import NormalOptions

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match="no GPU"):
        main(NormalOptions(), None, Console())
