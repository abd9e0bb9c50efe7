"""Tensors at fixed addresses: what a captured step reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ep_runtime.errors import CaptureError, ShapeError

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
        are staged by CUDA and wait for it; pin such inputs. check() comes first.
        """
        if inputs is not None:
            for name, tensor in inputs.items():
                target = self._storage[name]
                if target.dim() == 0:
                    target.copy_(tensor, non_blocking=True)
                elif num_tokens > 0:
                    target[:num_tokens].copy_(tensor[:num_tokens], non_blocking=True)
        self.num_tokens.fill_(num_tokens)

    def num_bytes(self, bucket: int) -> int:
        return sum(t.numel() * t.element_size() for t in self.views(bucket).values())

    def check(self, inputs: Mapping[str, torch.Tensor] | None, num_tokens: int) -> None:
        """Raise ShapeError unless load() can copy these."""
        if inputs is None:
            return
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


def checked_outputs(outputs: Any, num_ranks: int = 1) -> list[Tensors]:
    """What a step returned, for every rank. Raises CaptureError where it is anything else."""
    whole = isinstance(outputs, Mapping | torch.Tensor) or not isinstance(outputs, Iterable)
    listed: list[Any] = [outputs] if whole else list(outputs)
    if len(listed) != num_ranks or not all(map(_are_tensors, listed)):
        told = ", ".join(_told(rank) for rank in listed)
        raise CaptureError(
            f"the step returned {told}; it must return a dict of tensors by name"
            + (f" for each of the {num_ranks} ranks, in a list" if num_ranks > 1 else "")
        )
    return [dict(rank) for rank in listed]


def _are_tensors(rank: object) -> bool:
    return isinstance(rank, Mapping) and all(isinstance(t, torch.Tensor) for t in rank.values())


def _told(rank: object) -> str:
    if not isinstance(rank, Mapping):
        return f"a {type(rank).__name__}"
    return "{" + ", ".join(f"{name!r}: {type(t).__name__}" for name, t in rank.items()) + "}"


def per_token_outputs(
    captured: Sequence[tuple[Sequence[int], Sequence[Tensors]]],
) -> list[frozenset[str]]:
    """For every rank, the outputs with as many rows as the bucket has tokens, in every graph that
    has them.

    captured: of each graph the bucket and the outputs of every rank.
    """

    def names(rank: int) -> frozenset[str]:
        found, others = set[str](), set[str]()
        for buckets, outputs in captured:
            for name, tensor in outputs[rank].items():
                by_token = tensor.dim() > 0 and tensor.shape[0] == buckets[rank]
                (found if by_token else others).add(name)
        return frozenset(found - others)

    return [names(rank) for rank in range(len(captured[0][0]))]


def real_rows(outputs: Tensors, per_token: frozenset[str], num_tokens: int) -> Tensors:
    """Outputs cut to the real tokens: those that have a row for each token."""
    return {
        name: tensor[:num_tokens] if name in per_token else tensor
        for name, tensor in outputs.items()
    }
