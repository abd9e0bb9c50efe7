"""Steps and autograd: nothing is recorded, and a step runs in the mode it was captured in.

A CUDA graph replays what was captured, whatever mode its caller is in. What must be the same on the
host backend, and what both keep between replays (static inputs, outputs), comes through here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]


def without_grad(run: Callable[[], list[Tensors]]) -> Callable[[], list[Tensors]]:
    """`run` without gradients, and in the inference mode of this moment, whoever calls it.

    A step built in inference mode may write to inference tensors (a cache that was allocated
    there), one built outside of it may keep what it makes: neither depends on the replay.
    """
    inference = torch.is_inference_mode_enabled()

    def in_its_mode() -> list[Tensors]:
        # In this order: leaving inference mode turns gradients on.
        with torch.inference_mode(inference), torch.no_grad():
            return [{name: plain(tensor) for name, tensor in rank.items()} for rank in run()]

    return in_its_mode


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory outside of autograd: it requires no gradient, any mode may write to it."""
    if not tensor.is_inference():
        return tensor.detach()
    # A view of an inference tensor is one too, a tensor over its storage is not.
    with torch.inference_mode(False):
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own, outside of autograd."""
    with torch.inference_mode(False):
        return plain(tensor).clone()
