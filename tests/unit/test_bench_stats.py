"""The three numbers of a record."""

from __future__ import annotations

import pytest

from ep_runtime.bench.stats import Summary, slowest_rank
from ep_runtime.errors import ShapeError


def test_each_replay_counts_with_its_slowest_rank() -> None:
    # maxima over ranks: 4, 5, 9
    assert slowest_rank([[1.0, 5.0, 9.0], [4.0, 2.0, 3.0]]) == Summary(5.0, 4.0, 9.0)


def test_the_median_is_over_replays_not_over_ranks() -> None:
    slow_first = [[10.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert slowest_rank(slow_first).median_us == 1.0


def test_an_even_number_of_replays_takes_the_middle() -> None:
    assert slowest_rank([[1.0, 2.0, 3.0, 10.0]]).median_us == 2.5


def test_known_work_is_taken_off_every_number() -> None:
    assert Summary(30.0, 29.0, 35.0).minus(20.0) == Summary(10.0, 9.0, 15.0)


@pytest.mark.parametrize("times", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_missing_replays_are_refused(times: list[list[float]]) -> None:
    with pytest.raises(ShapeError, match="replays per rank"):
        slowest_rank(times)
