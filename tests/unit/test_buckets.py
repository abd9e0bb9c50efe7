"""Buckets: which batch sizes are captured and which one a batch takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_runtime.errors import ShapeError
from ep_runtime.graphs import Buckets


@given(st.sets(st.integers(1, 512), min_size=1), st.data())
def test_pick_is_the_smallest_bucket_that_fits(sizes: set[int], data: st.DataObject) -> None:
    buckets = Buckets(tuple(sorted(sizes)), 512)
    num_tokens = data.draw(st.integers(0, buckets.largest))
    assert buckets.pick(num_tokens) == min(size for size in sizes if size >= num_tokens)


def test_zero_tokens_take_the_smallest_bucket() -> None:
    assert Buckets((4, 8), 8).pick(0) == 4


@pytest.mark.parametrize(
    ("sizes", "value", "remedy"),
    [
        ((), "no buckets", "at least one"),
        ((0, 4), "bucket 0", "1..8"),
        ((4, 9), "bucket 9", "max_tokens"),
        ((4, 4), "bucket 4 follows 4", "drop"),
        ((8, 4), "bucket 4 follows 8", "sort"),
        ((1.5,), "bucket 1.5", "in tokens"),
        ((True,), "bucket True", "in tokens"),
    ],
)
def test_bad_sizes_are_named_with_a_remedy(sizes: tuple[int, ...], value: str, remedy: str) -> None:
    with pytest.raises(ShapeError, match=value) as caught:
        Buckets(sizes, 8)
    assert remedy in str(caught.value)


def test_a_batch_above_the_largest_bucket_is_refused() -> None:
    with pytest.raises(ShapeError, match="9, above the largest bucket 8") as caught:
        Buckets((4, 8), 16).pick(9)
    assert "max_tokens=16" in str(caught.value)


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match="-1"):
        Buckets((4,), 8).pick(-1)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_powers_of_two_end_at_the_largest(largest: int, sizes: tuple[int, ...]) -> None:
    assert Buckets.powers_of_two(largest).sizes == sizes
