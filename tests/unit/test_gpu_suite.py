"""What `make gpu-test` runs, and what it makes of the results."""

from __future__ import annotations

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import across_gpus, num_workers, passes, status

GIB = 1 << 30


@pytest.mark.parametrize(
    ("gpus", "cores", "gib", "workers"),
    [
        (1, 16, 80, gpu_suite.PER_GPU),
        (2, 32, 80, 2 * gpu_suite.PER_GPU),
        (8, 16, 80, 15),  # a core each, and one for pytest
        (1, 16, 24, 2),  # as many as there is memory for
        (1, 2, 80, 0),  # one worker would be no gain
        (1, 1, 8, 0),
    ],
)
def test_workers_have_a_core_and_memory_each(gpus: int, cores: int, gib: int, workers: int) -> None:
    assert num_workers(gpus, cores, gib * GIB) == workers


@pytest.mark.parametrize(
    ("workers", "gpus"), [(0, 0), (0, 1), (6, 1), (0, 2), (12, 2), (12, 4), (15, 8)]
)
def test_every_gpu_test_is_in_one_pass_and_disturbed_ones_alone(workers: int, gpus: int) -> None:
    planned = passes(workers, gpus)

    def chosen(*marks: str) -> list[tuple[int, bool, bool]]:
        """(pass, with workers, a GPU for each) that takes a test with these marks"""
        names = {name: name in marks for name in ("gpu", "alone", "multi")}
        return [
            (n, "-n" in more, "--gpu-per-worker" in more)
            for n, (marked, more) in enumerate(planned)
            if eval(marked, {}, names)
        ]

    last = len(planned) - 1
    assert chosen("gpu") == [(0, workers > 1, workers > 1)]
    assert chosen("gpu", "alone") == [(last, False, False)]
    assert chosen() == []
    if gpus > 1:
        side_by_side = across_gpus(workers, gpus) > 1
        assert chosen("multi") == chosen("multi", "gpu") == [(1, side_by_side, False)]
        assert chosen("multi", "alone") == [(last, False, False)]


@pytest.mark.parametrize(
    ("codes", "result"),
    [([0, 0], 0), ([0, 5], 0), ([5, 0], 0), ([5, 5], 5), ([1, 0], 1), ([0, 2], 2), ([5, 1], 1)],
)
def test_an_empty_pass_is_no_failure_unless_all_are_empty(codes: list[int], result: int) -> None:
    assert status(codes) == result
