"""Checkpoints: bf16 safetensors with the configuration and where the weights come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ep_runtime.errors import CheckpointError
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.model import LanguageModel

FORMAT = "ep_runtime.lm/1"
PACKAGED = Path(__file__).with_name("checkpoint.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """weights: name -> bf16 tensor on the CPU, as `LanguageModel.state_dict()` names them.

    training: what `train` recorded (corpus with licences, seed, steps, validation bits per byte).
    """

    config: LmConfig
    weights: dict[str, Tensor]
    training: dict[str, Any]

    def fingerprint(self) -> bytes:
        """32 bytes that two checkpoints share exactly when shape and weights are the same."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name in sorted(self.weights):
            digest.update(self.weights[name].view(torch.int16).numpy().tobytes())
        return digest.digest()

    def reference(self, device: str | torch.device = "cpu") -> LanguageModel:
        """The single-rank model in float32, from the same bf16 numbers."""
        model = LanguageModel(self.config)
        model.load_state_dict({name: w.float() for name, w in self.weights.items()})
        return model.to(device).eval().requires_grad_(False)


def random(config: LmConfig, seed: int = 0) -> Checkpoint:
    """Weights that nobody trained, with logits of a few units: for tests and benchmarks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(config)
        model.embedding.data.normal_(std=3 * config.hidden**-0.5)
    weights = {name: w.bfloat16() for name, w in model.state_dict().items()}
    return Checkpoint(config, weights, {"seed": seed})


def expected_shapes(config: LmConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(w.shape) for name, w in LanguageModel(config).state_dict().items()}


def save(path: Path, model: LanguageModel, training: Mapping[str, Any]) -> None:
    """Write weights rounded to bf16; `training` must be JSON-serialisable."""
    weights = {
        name: w.detach().to(torch.bfloat16).cpu().contiguous()
        for name, w in model.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "config": model.config.to_json(),
        "training": json.dumps(dict(training), sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(path), metadata=metadata)


def load(path: Path | None = None) -> Checkpoint:
    """Read a checkpoint; without a path, the one that ships with the package.

    Raises CheckpointError when the file is missing, damaged, of another format, or has a tensor
    that is missing, unknown, or of a shape or dtype that its own configuration does not imply.
    """
    path = PACKAGED if path is None else path
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there; give a checkpoint, or train one with "
            "`python -m ep_runtime.lm.train`"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not readable as safetensors ({error}); "
            "fetch it again or give another"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, want {FORMAT!r}; give a checkpoint "
            "written by ep_runtime.lm.train"
        )
    config = LmConfig.from_json(metadata.get("config", ""))
    _check_tensors(path, config, weights)
    try:
        training = json.loads(metadata.get("training", "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} says of its training what is not JSON ({error}); fetch it again or give"
            " another"
        ) from error
    return Checkpoint(config, weights, training)


def _check_tensors(path: Path, config: LmConfig, weights: Mapping[str, Tensor]) -> None:
    want = expected_shapes(config)
    if missing := sorted(set(want) - set(weights)):
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(want)} tensors, first {missing[0]!r}; "
            "give a complete checkpoint"
        )
    if unknown := sorted(set(weights) - set(want)):
        raise CheckpointError(
            f"{path} has {len(unknown)} unknown tensors, first {unknown[0]!r}; its configuration "
            f"implies {len(want)} tensors; give a checkpoint of this model"
        )
    for name, shape in want.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.bfloat16:
            raise CheckpointError(
                f"{path}: {name} is {list(tensor.shape)} {tensor.dtype}, want {list(shape)} "
                "torch.bfloat16; give a checkpoint of this model"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} holds values that are not finite; fetch or train it again"
            )
