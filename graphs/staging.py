"""Tensors at fixed addresses: what a captured step reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ep_runtime.errors import CaptureError, ShapeError
from ep_runtime.graphs.modes import Tensors, plain


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
        self._storage = {name: plain(tensor) for name, tensor in storage.items()}
        self._extents = [_extent(tensor, capacity) for tensor in self._storage.values()]
        self.num_tokens = plain(torch.zeros((), dtype=torch.int32, device=device))

    def views(self, bucket: int) -> Tensors:
        """The inputs of one bucket, as tensors of their own: what autograd makes of one, if the
        caller fills it with gradients on, reaches neither the step nor the other buckets.
        """
        return {
            name: (tensor if tensor.dim() == 0 else tensor[:bucket]).detach()
            for name, tensor in self._storage.items()
        }

    @torch.inference_mode()
    def load(self, inputs: Mapping[str, torch.Tensor] | None, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows in and set the scalar; nothing synchronises.

        `None` leaves the tensors as the caller has filled them. Gradients stay behind. Copies from
        pageable host memory are staged by CUDA and wait for it; pin such inputs. check() comes
        first.
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
        if not isinstance(inputs, Mapping):
            raise ShapeError(f"inputs is a {type(inputs).__name__}; give a dict of tensors by name")
        if inputs.keys() != self._storage.keys():
            raise ShapeError(
                f"inputs {sorted(inputs)} were given, the step was captured with "
                f"{sorted(self._storage)}; pass each of these and nothing else"
            )
        for name, tensor in inputs.items():
            target = self._storage[name]
            if not _has_values(tensor):
                raise ShapeError(
                    f"input {name!r} is {_described(tensor)}; give a dense tensor like the one the "
                    f"step was captured with, {target.dtype} {list(target.shape)}"
                )
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
        if not all(map(self._is_outside, inputs.values())):
            self._check_overlap(inputs, num_tokens)

    def _is_outside(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is seen at a glance, as every replay asks, to share no static memory."""
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        for low, high in self._extents:
            if begin < high and low < end:
                return False
        return tensor.is_contiguous()

    def _check_overlap(self, inputs: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Raise ShapeError where a copy would change rows that it, or a later one, still reads."""
        written: list[tuple[str, int, int]] = []
        for name, tensor in inputs.items():
            target = self._storage[name]
            begin, end = _extent(tensor, num_tokens)
            low, high = _extent(target, num_tokens)
            if begin != low or tensor.stride() != target.stride():  # else it is there already
                written.append((name, low, high))
            for static, first, last in written:
                if begin < last and first < end:
                    raise ShapeError(
                        f"input {name!r} is in the memory of static input {static!r}, whose first "
                        f"{num_tokens} rows are about to be overwritten; pass a clone() of it"
                    )


def _has_values(tensor: object) -> bool:
    """A dense tensor in memory: not sparse, not on meta."""
    return (
        isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    )


def _described(given: object) -> str:
    if not isinstance(given, torch.Tensor):
        return f"a {type(given).__name__}"
    return f"a tensor of {given.layout} on {given.device}"


def _extent(tensor: torch.Tensor, rows: int) -> tuple[int, int]:
    """Addresses from the first byte of the first rows to behind their last; a scalar is whole."""
    shape = (rows, *tensor.shape[1:]) if tensor.dim() else ()
    begin = tensor.data_ptr()
    if 0 in shape:
        return begin, begin
    last = sum((size - 1) * step for size, step in zip(shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


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
