"""Stages that all ranks end together, also when one of them fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from ep_runtime.errors import EpError
from ep_runtime.world import World

T = TypeVar("T")


class StageError(EpError, RuntimeError):
    """A rank failed in this stage; every rank of the team raises this. Go on with the next one."""


class TeamLostError(EpError, RuntimeError):
    """The ranks cannot reach each other any more; end the run."""


class Team:
    """A world whose ranks tell each other in every collective whether they are still well.

    A rank that fails leaves its stage and says so in the place of its next collective. The others
    learn it in theirs, so the ranks count the same number of collectives and stay in step.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def num_ranks(self) -> int:
        return self.world.num_ranks

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank. Raises StageError where a rank says it failed."""
        return self._exchange({"value": value})

    def meet(self) -> None:
        """A host barrier."""
        self.gather(None)

    def stage(self, name: str, run: Callable[[], T]) -> T:
        """Run `run` (which may gather and meet) on every rank; raise StageError on all if it
        fails on any."""
        try:
            result = run()
        except (StageError, TeamLostError):
            raise
        except Exception as error:
            self._exchange({"failed": f"{name}: {type(error).__name__}: {error}"})
            raise  # not reached: a rank's own failure comes back to it too
        self.meet()
        return result

    def _exchange(self, mine: dict[str, Any]) -> list[Any]:
        try:
            texts = self.world.all_gather(json.dumps(mine).encode())
        except EpError as error:
            raise TeamLostError(str(error)) from error
        answers = [json.loads(text) for text in texts]
        failed = [
            f"rank {rank} failed at {answer['failed']}"
            for rank, answer in enumerate(answers)
            if "failed" in answer
        ]
        if failed:  # all of them: a rank that waited in vain is not the one to blame
            raise StageError("; ".join(failed))
        return [answer["value"] for answer in answers]
