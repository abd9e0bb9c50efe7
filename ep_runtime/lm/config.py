"""Shape of the language model."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from ep_runtime.errors import CheckpointError, ConfigError

VOCAB = 256  # bytes


@dataclass(frozen=True, slots=True)
class LmConfig:
    """A byte-level MoE transformer. Raises ConfigError for a shape that cannot be built.

    hidden: H, a multiple of 128 (the runtime's unit). inner: inner size of one routed expert.
    shared_inner: inner size of the shared expert. max_context: positions of the KV cache.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    num_experts: int = 16
    topk: int = 4
    inner: int = 64
    shared_inner: int = 256
    max_context: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "num_experts", "inner", "shared_inner"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}; want a whole number of at least 1")
        if self.hidden % 128:
            raise ConfigError(f"hidden is {self.hidden}; want a multiple of 128")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"heads is {self.heads}; want a divisor of hidden / 2 = {self.hidden // 2} "
                "(a head rotates pairs of channels)"
            )
        if type(self.topk) is not int or not 1 <= self.topk <= self.num_experts:
            raise ConfigError(
                f"topk is {self.topk}; want 1 to num_experts = {self.num_experts}; lower topk"
            )
        if type(self.max_context) is not int or self.max_context < 2:
            raise ConfigError(
                f"max_context is {self.max_context!r}; want a whole number of at least 2"
            )

        for name in ("rope_base", "norm_eps"):
            number = getattr(self, name)
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise ConfigError(f"{name} is {number!r}; want a finite number above 0")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LmConfig:
        """Raises CheckpointError for JSON that does not describe this model."""
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"the model's configuration is not JSON ({error}); give a checkpoint written by "
                "ep_runtime.lm.train"
            ) from error
        if not isinstance(values, dict) or set(values) != known:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(
                f"the model's configuration has {got}, want exactly {sorted(known)}; give a "
                "checkpoint written by this version of ep_runtime.lm.train"
            )
        try:
            return cls(**values)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint's configuration is not valid ({error}); give another checkpoint"
            ) from error
