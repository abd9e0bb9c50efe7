"""Checkpoints: a file that does not fit is refused with what is wrong and what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ep_runtime.errors import CheckpointError
from ep_runtime.lm import checkpoint
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.model import LanguageModel

CONFIG = LmConfig(layers=1, hidden=128, heads=2, num_experts=4, topk=2, inner=8, shared_inner=16)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, LanguageModel(CONFIG), {"seed": 7})
    return file


def rewrite(path: Path, change: Callable[[Tensors, dict[str, str]], object]) -> None:
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, str(path), metadata=metadata)


def test_round_trip_keeps_bf16_weights_configuration_and_record(path: Path) -> None:
    torch.manual_seed(0)
    want = LanguageModel(CONFIG).state_dict()
    loaded = checkpoint.load(path)
    assert loaded.config == CONFIG
    assert loaded.training == {"seed": 7}
    assert loaded.weights.keys() == want.keys()
    for name, weight in want.items():
        assert torch.equal(loaded.weights[name], weight.bfloat16())


def test_reference_computes_in_float32_from_the_bf16_numbers(path: Path) -> None:
    loaded = checkpoint.load(path)
    model = loaded.reference()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.data, loaded.weights["embedding"].float())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors is not there.*train"):
        checkpoint.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_file(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{keep} bytes\) is not readable"):
        checkpoint.load(path)


def test_other_format(path: Path) -> None:
    rewrite(path, lambda _, metadata: metadata.update(format="gpt/9"))
    with pytest.raises(CheckpointError, match=r"gpt/9.*want 'ep_runtime\.lm/1'"):
        checkpoint.load(path)


def test_damaged_record_of_the_training(path: Path) -> None:
    rewrite(path, lambda _, metadata: metadata.update(training="{"))
    with pytest.raises(CheckpointError, match="says of its training what is not JSON"):
        checkpoint.load(path)


def test_missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors, _: tensors.pop("layers.0.router"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*layers\.0\.router"):
        checkpoint.load(path)


def test_unknown_tensor(path: Path) -> None:
    rewrite(path, lambda tensors, _: tensors.update(extra=torch.zeros(1, dtype=torch.bfloat16)))
    with pytest.raises(CheckpointError, match=r"1 unknown tensors, first 'extra'"):
        checkpoint.load(path)


def test_configuration_that_the_tensors_do_not_have(path: Path) -> None:
    wider = LmConfig(**{**_fields(CONFIG), "shared_inner": 32})
    rewrite(path, lambda _, metadata: metadata.update(config=wider.to_json()))
    with pytest.raises(CheckpointError, match=r"\[32, 128\].*want \[64, 128\]"):
        checkpoint.load(path)


def test_other_dtype(path: Path) -> None:
    rewrite(
        path, lambda tensors, _: tensors.update(final_norm=torch.ones(128, dtype=torch.float16))
    )
    with pytest.raises(CheckpointError, match=r"final_norm is .*float16.*want .*bfloat16"):
        checkpoint.load(path)


def test_values_that_are_not_finite(path: Path) -> None:
    rewrite(path, lambda tensors, _: tensors["embedding"][3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="embedding holds values that are not finite"):
        checkpoint.load(path)


def _fields(config: LmConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in LmConfig.__dataclass_fields__}
