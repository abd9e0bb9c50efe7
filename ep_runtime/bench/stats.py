"""From the times of every rank and replay to the three numbers that a record carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ep_runtime.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Summary:
    """Microseconds over replays, each replay taken at its slowest rank."""

    median_us: float
    min_us: float
    max_us: float

    def minus(self, offset_us: float) -> Summary:
        """What is left of each number after a part whose own time is known."""
        return Summary(self.median_us - offset_us, self.min_us - offset_us, self.max_us - offset_us)


def slowest_rank(times: Sequence[Sequence[float]]) -> Summary:
    """Summarise `times[rank][replay]`.

    A step ends when its slowest rank ends, so each replay counts with the maximum over ranks; the
    median, minimum and maximum are then taken over replays. Raises ShapeError when a rank has no
    replay or ranks have different numbers of them.
    """
    counts = sorted({len(rank_times) for rank_times in times})
    if len(counts) != 1 or counts[0] == 0:
        raise ShapeError(
            f"replays per rank: {counts}; every rank must report the same number, at least one"
        )
    slowest = [max(replay) for replay in zip(*times, strict=True)]
    return Summary(median(slowest), min(slowest), max(slowest))
