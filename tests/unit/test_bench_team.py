"""Ranks that fail together and go on together. Ranks are threads over one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from ep_runtime.bench.team import StageError, Team, TeamLostError
from ep_runtime.world import World


def on_ranks(run: Callable[[Team], Any], num_ranks: int = 3, timeout_s: float = 20.0) -> list[Any]:
    """`run` on every rank, each with its team; results or exceptions by rank."""
    store = HashStore()
    teams = [Team(World.from_store(store, r, num_ranks, timeout_s)) for r in range(num_ranks)]

    def one(team: Team) -> Any:
        try:
            return run(team)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(one, teams))


def test_gather_returns_every_ranks_value_by_rank() -> None:
    results = on_ranks(lambda team: team.gather([team.rank, "x"]))
    assert results == [[[0, "x"], [1, "x"], [2, "x"]]] * 3


def test_a_stage_returns_what_it_made() -> None:
    assert on_ranks(lambda team: team.stage("work", lambda: team.rank * 10)) == [0, 10, 20]


@pytest.mark.parametrize("meets_before", [0, 1, 2])
def test_a_failure_anywhere_in_a_stage_fails_it_on_every_rank(meets_before: int) -> None:
    def stage(team: Team) -> None:
        for count in range(3):
            if team.rank == 1 and count == meets_before:
                raise ValueError("row 3 is missing")
            team.meet()

    for error in on_ranks(lambda team: team.stage("check", lambda: stage(team))):
        assert isinstance(error, StageError)
        assert "rank 1 failed at check: ValueError: row 3 is missing" in str(error)


def test_ranks_are_in_step_after_a_failure() -> None:
    def run(team: Team) -> list[int]:
        def unlucky() -> None:
            team.meet()
            if team.rank == 2:
                raise RuntimeError("no memory")
            team.meet()
            team.meet()

        with pytest.raises(StageError):
            team.stage("first", unlucky)
        gathered: list[int] = team.stage("second", lambda: team.gather(team.rank))
        return gathered

    assert on_ranks(run) == [[0, 1, 2]] * 3


def test_two_ranks_may_fail_at_once() -> None:
    def fail(team: Team) -> None:
        if team.rank != 1:
            raise RuntimeError(f"rank {team.rank} is tired")

    for error in on_ranks(lambda team: team.stage("walk", lambda: fail(team))):
        assert isinstance(error, StageError)
        assert "rank 0 is tired" in str(error)
        assert "rank 2 is tired" in str(error)


def test_a_rank_that_is_gone_ends_the_run_instead_of_the_stage() -> None:
    def run(team: Team) -> None:
        if team.rank == 0:
            return
        team.stage("work", team.meet)

    gone, *left = on_ranks(run, timeout_s=0.5)
    assert gone is None
    assert all(isinstance(error, TeamLostError) for error in left)
    assert all("rank 0" in str(error) for error in left)
