"""What the three layers share: weights, which rows an expert multiplies, and the choice of kernels.

T tokens, R ranks, M max_tokens, L local experts, H hidden, I intermediate, K top-k.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from ep_runtime import EpConfig
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.handles import Received

ROW_TILE = 16  # rows of one tile of the GEMM; a tile never holds rows of two experts


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """This rank's experts, bf16 and contiguous: gate, up [L, I, H], down [L, H, I].

    y = down @ (silu(gate @ x) * (up @ x))
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self) -> None:
        experts, inner, hidden = self.gate.shape
        wanted = {
            "gate": (experts, inner, hidden),
            "up": (experts, inner, hidden),
            "down": (experts, hidden, inner),
        }
        for name, shape in wanted.items():
            tensor: torch.Tensor = getattr(self, name)
            if (
                tuple(tensor.shape) != shape
                or tensor.dtype != torch.bfloat16
                or not tensor.is_contiguous()
            ):
                raise ConfigError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()};"
                    f" give contiguous bfloat16 {shape}"
                )

    @property
    def inner(self) -> int:
        """I"""
        return self.gate.shape[1]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows each expert multiplies. Expert e has slots first[e] .. first[e] + count[e] - 1.

    first      int32 [L+1] on the device; multiples of ROW_TILE unless `per_expert` is given
    count      int32 [L] on the device
    per_expert batched: slots of every expert, so that first[e] = e * per_expert; else 0
    pairs      compact: int32 [slots], row * K + k of the choice that a slot holds; else None, and
               slot s holds row s
    topk       K
    """

    first: torch.Tensor
    count: torch.Tensor
    per_expert: int
    pairs: torch.Tensor | None
    topk: int


class Kernels(Protocol):
    """The arithmetic, in Triton for GPUs and in plain torch for CPU ranks: the same calls.

    The Triton calls can be captured: their grids depend on sizes known at capture, and what is not
    there is left out by counts that are read on the device. The torch calls read the counts on the
    host, so they are for CPU ranks alone.
    """

    path: str

    def gate_up(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        groups: Groups,
        weights: ExpertWeights,
        h: torch.Tensor,
    ) -> None:
        """h [slots, I] bf16 = silu(gate @ x) * (up @ x) in the slots of every expert.

        x [rows, H] bf16, or float8_e4m3fn with scales [rows, H/128] float32. FP32 inside.
        """
        ...

    def down(
        self, h: torch.Tensor, groups: Groups, weights: ExpertWeights, y: torch.Tensor
    ) -> None:
        """y [slots, H] bf16 = down @ h in the slots of every expert."""
        ...

    def down_weighted(
        self,
        h: torch.Tensor,
        groups: Groups,
        weights: ExpertWeights,
        topk_weights: torch.Tensor,
        terms: torch.Tensor,
    ) -> None:
        """terms [rows * K, H] float32: row `pair` = weight of the pair * (down @ h of its slot).

        topk_weights [rows, K] float32.
        """
        ...

    def sort(
        self,
        topk_idx: torch.Tensor,
        count: torch.Tensor,
        first: torch.Tensor,
        cursor: torch.Tensor,
        pairs: torch.Tensor,
    ) -> None:
        """Give every choice in topk_idx [rows, K] that is not -1 a slot of its expert.

        Writes first [L+1] (multiples of ROW_TILE) and pairs [slots]; cursor int32 [L] is scratch.
        The order of an expert's slots is free: no result depends on it.
        """
        ...

    def sum_terms(
        self,
        terms: torch.Tensor,
        topk_idx: torch.Tensor,
        num_messages: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """y [rows, H] bf16: per message the FP32 sum of its terms, in the order of k.

        num_messages int32 [R]: their sum is the number of rows that are there.
        """
        ...


class Experts(Protocol):
    """One rank's experts for one chain: they keep the tensor that combine reads.

    Calling them fills and returns it. Capturable on GPUs, after one eager call: kernels are
    compiled at their first use, which a capture does not survive.
    """

    kernels: Kernels

    def __call__(self, received: Received) -> torch.Tensor: ...

    def workspace(self) -> list[torch.Tensor]:
        """Everything that a call writes; for tests."""
        ...


def kernels_for(device: torch.device) -> Kernels:
    """Triton's on a GPU, plain torch's on the CPU. Raises BuildError for a GPU without Triton."""
    if device.type == "cpu":
        return cast(Kernels, importlib.import_module("examples.experts.torch_kernels"))
    try:
        return cast(Kernels, importlib.import_module("examples.experts.triton_kernels"))
    except ImportError as error:
        raise BuildError(
            f"the examples' GPU kernels are Triton's, which cannot be imported ({error}); install"
            " triton, or run with --backend host"
        ) from error


def check_weights(weights: ExpertWeights, config: EpConfig, num_ranks: int, wanted: str) -> None:
    """Raise ConfigError unless `weights` are those of one rank and the format is `wanted`."""
    local = config.local_experts(num_ranks)
    experts, _, hidden = weights.gate.shape
    if (experts, hidden) != (local, config.hidden):
        raise ConfigError(
            f"weights of {experts} experts with hidden {hidden}: this rank holds {local} experts"
            f" with hidden {config.hidden}; give its share of the weights"
        )
    if config.recv_format != wanted:
        raise ConfigError(
            f"recv_format={config.recv_format!r}: these experts take {wanted!r}; build the Buffer"
            " with it"
        )
