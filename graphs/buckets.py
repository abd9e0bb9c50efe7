"""Buckets: the batch sizes that a step is captured for."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_runtime.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Buckets:
    """Batch sizes in tokens, ascending, each from 1 to `max_tokens` (M, the group's limit).

    Raises ShapeError where a size is out of range, repeated or out of order.
    """

    sizes: tuple[int, ...]
    max_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes:
            raise ShapeError(
                f"no buckets were given; name at least one batch size from 1 to {self.max_tokens}"
            )
        previous = 0
        for size in self.sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise ShapeError(f"bucket {size!r} is not an int; give sizes in tokens")
            if not 1 <= size <= self.max_tokens:
                raise ShapeError(
                    f"bucket {size} is outside 1..{self.max_tokens} (max_tokens); drop it or raise "
                    "EpConfig.max_tokens"
                )
            if size <= previous:
                raise ShapeError(
                    f"bucket {size} follows {previous}, but sizes must ascend; sort them and drop "
                    "repeats"
                )
            previous = size

    @classmethod
    def of(cls, given: Buckets | Iterable[int], max_tokens: int) -> Buckets:
        """Sizes or buckets, within the group's own limit."""
        if isinstance(given, Buckets):
            return cls(given.sizes, max_tokens)
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise ShapeError(
                f"buckets is {given!r}; give a sequence of batch sizes, such as (1, 8, 32), or "
                "Buckets.powers_of_two(32)"
            )
        return cls(tuple(given), max_tokens)

    @classmethod
    def powers_of_two(cls, largest: int, max_tokens: int | None = None) -> Buckets:
        """1, 2, 4 ... and `largest` itself. `max_tokens` defaults to `largest`."""
        sizes = [1 << i for i in range(max(largest, 1).bit_length()) if 1 << i < largest]
        return cls((*sizes, largest), largest if max_tokens is None else max_tokens)

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def pick(self, num_tokens: int) -> int:
        """The smallest bucket that holds `num_tokens`; 0 tokens take the smallest bucket.

        Raises ShapeError for a negative number and for one above the largest bucket.
        """
        if num_tokens < 0:
            raise ShapeError(f"num_tokens is {num_tokens}, below 0; give the real batch size")
        for size in self.sizes:
            if num_tokens <= size:
                return size
        raise ShapeError(
            f"num_tokens is {num_tokens}, above the largest bucket {self.largest}; add a bucket "
            f"(up to max_tokens={self.max_tokens}) or split the batch"
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def as_ints(given: object, what: str = "num_tokens") -> tuple[int, ...]:
    """Numbers as a caller gives them: an int, or one for each rank.

    Raises ShapeError for anything else. Tensors as well: a graph is picked by a number that the
    host has, and to fetch one would synchronise.
    """
    try:
        alone = not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0
        return tuple(map(_as_int, [given] if alone else given))  # type: ignore[call-overload]
    except TypeError:
        told = f"{what} is {given!r}; give an int, or one for each virtual rank"
        raise ShapeError(told) from None


def _as_int(number: Any) -> int:
    if isinstance(number, torch.Tensor):
        raise TypeError
    return operator.index(number)
