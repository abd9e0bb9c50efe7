"""Tensors at fixed addresses: what a captured step reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ep_runtime.errors import ShapeError

Tensors = dict[str, torch.Tensor]


class StaticInputs:
    """One rank's inputs, stored once at the largest bucket; smaller buckets are views of it.

    A tensor's first dimension counts tokens; one without dimensions is copied whole.
    `num_tokens` is the int32 scalar on the device that a step passes to `Buffer.dispatch`.
    """

    def __init__(self, storage: Mapping[str, torch.Tensor], capacity: int, device: torch.device):
        for name, tensor in storage.items():
            if tensor.dim() > 0 and tensor.shape[0] != capacity:
                raise ShapeError(
                    f"make_inputs({capacity}) gave {name!r} with {tensor.shape[0]} rows; the first "
                    f"dimension counts tokens and must be {capacity}"
                )
            if tensor.device != device:
                raise ShapeError(
                    f"make_inputs({capacity}) gave {name!r} on {tensor.device}; allocate it on the "
                    f"buffer's device {device}"
                )
        self._storage = dict(storage)
        self.num_tokens = torch.zeros((), dtype=torch.int32, device=device)

    def views(self, bucket: int) -> Tensors:
        """The inputs of one bucket."""
        return {
            name: tensor if tensor.dim() == 0 else tensor[:bucket]
            for name, tensor in self._storage.items()
        }

    def load(self, inputs: Mapping[str, torch.Tensor] | None, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows in and set the scalar; nothing synchronises.

        `None` leaves the tensors as the caller has filled them. Copies from pageable host memory
        are staged by CUDA and wait for it; pin such inputs. Raises ShapeError before any copy.
        """
        if inputs is not None:
            self._check(inputs, num_tokens)
            for name, tensor in inputs.items():
                target = self._storage[name]
                if target.dim() == 0:
                    target.copy_(tensor, non_blocking=True)
                elif num_tokens > 0:
                    target[:num_tokens].copy_(tensor[:num_tokens], non_blocking=True)
        self.num_tokens.fill_(num_tokens)

    def num_bytes(self, bucket: int) -> int:
        return sum(t.numel() * t.element_size() for t in self.views(bucket).values())

    def _check(self, inputs: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        if inputs.keys() != self._storage.keys():
            raise ShapeError(
                f"inputs {sorted(inputs)} were given, the step was captured with "
                f"{sorted(self._storage)}; pass each of these and nothing else"
            )
        for name, tensor in inputs.items():
            target = self._storage[name]
            if tensor.dtype is not target.dtype or tensor.shape[1:] != target.shape[1:]:
                raise ShapeError(
                    f"input {name!r} is {tensor.dtype} {list(tensor.shape)}, the step was captured "
                    f"with {target.dtype} {list(target.shape)}; only the number of rows may differ"
                )
            if tensor.dim() != target.dim() or (tensor.dim() and tensor.shape[0] < num_tokens):
                raise ShapeError(
                    f"input {name!r} has shape {list(tensor.shape)}, num_tokens is {num_tokens}; "
                    "give at least num_tokens rows"
                )


def real_rows(outputs: Tensors, bucket: int, num_tokens: int) -> Tensors:
    """Outputs cut to the real tokens; a tensor whose first dimension is not the bucket is whole."""
    return {
        name: tensor[:num_tokens] if tensor.dim() and tensor.shape[0] == bucket else tensor
        for name, tensor in outputs.items()
    }
