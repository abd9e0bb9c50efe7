"""Steps between two meetings, as reset() makes them: of all ranks, or without some of them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from torch.distributed import HashStore
from world_ranks import on_ranks

from ep_runtime import ConfigError, GroupFault, PeerTimeout, World


def nothing() -> None:
    pass


def test_a_step_runs_when_all_have_come_and_ends_when_all_are_done() -> None:
    came, done = set[int](), set[int]()

    def step(world: World) -> None:
        def work() -> None:
            assert came == {0, 1, 2}
            time.sleep(0.1 * world.rank)
            done.add(world.rank)

        time.sleep(0.1 * world.rank)
        came.add(world.rank)
        world.between_meetings(work)
        assert done == {0, 1, 2}

    assert on_ranks(3, step) == [None] * 3


@pytest.mark.parametrize("absent", [[], [2]], ids=["of all ranks", "without a rank"])
def test_who_gave_up_waiting_comes_again_and_meets_who_was_late(absent: list[int]) -> None:
    """Both give up in turn, at either meeting; in the end no rank is a round ahead."""
    steps: list[int] = []

    def step(world: World) -> bytes:
        if world.rank in absent:
            return b""
        others = 3 - len(absent)
        if world.rank == 1:
            time.sleep(0.5)  # rank 0 has given up once, and waits again
        for _ in range(20):
            try:
                world.between_meetings(lambda: steps.append(world.rank), absent)
                break
            except PeerTimeout:
                time.sleep(0.3 * world.rank)
        world.timeout_s = 10
        world.between_meetings(lambda: steps.append(world.rank), absent)
        assert set(steps[-others:]) == set(range(others))
        return b"met"

    met = [b"" if rank in absent else b"met" for rank in range(3)]
    assert on_ranks(3, step, timeout_s=0.2) == met


def test_some_ranks_meet_without_the_others() -> None:
    """The absent rank does nothing. When it is back, all of them meet, and others can be absent."""

    def step(world: World) -> list[bytes]:
        for absent in (1, 1, 1, None, 0, None):
            if world.rank != absent:
                world.between_meetings(nothing, [] if absent is None else [absent])
        return world.all_gather(bytes([world.rank]))

    assert on_ranks(3, step) == [[b"\0", b"\1", b"\2"]] * 3


def test_a_rank_that_counts_itself_absent_meets_nobody() -> None:
    ran = []
    world = World.from_store(HashStore(), 0, 2, timeout_s=0.2)
    world.between_meetings(lambda: ran.append(0), [0])
    assert ran == [0]


def test_ranks_that_miss_different_ones_are_told() -> None:
    def step(world: World) -> None:
        if world.rank < 3:
            world.between_meetings(nothing, [2, 3] if world.rank == 1 else [3])

    outcomes = on_ranks(4, step, timeout_s=1)
    assert [type(one) for one in outcomes] == [ConfigError] * 3 + [type(None)]
    assert "rank 1 goes on without ranks [2, 3], rank 0 without [3]" in str(outcomes[0])
    assert "mask the same ranks" in str(outcomes[2])


def test_ranks_that_were_told_so_agree_at_the_next_try() -> None:
    """What they said before does not count, whoever comes first."""

    both = threading.Barrier(2)

    def step(world: World) -> None:
        if world.rank < 2:
            both.wait(10)
            with pytest.raises(ConfigError):
                world.between_meetings(nothing, [2] if world.rank else [3])
            time.sleep(0.2 * world.rank)
            world.timeout_s = 10
            world.between_meetings(nothing, [2, 3])

    assert on_ranks(4, step, timeout_s=1) == [None] * 4


def test_of_two_ranks_that_were_left_out_one_comes_back() -> None:
    def step(world: World) -> None:
        if world.rank < 2:
            world.between_meetings(nothing, [2, 3])
        if world.rank < 3:
            world.between_meetings(nothing, [3])
            world.between_meetings(nothing, [3])

    assert on_ranks(4, step, timeout_s=5) == [None] * 4


def test_a_step_that_is_done_is_not_done_again() -> None:
    """Rank 0 gives up while rank 1 still works: its peer may have left when it comes again."""
    done: list[int] = []

    def step(world: World) -> None:
        def work() -> None:
            time.sleep(0.6 * world.rank)
            done.append(world.rank)

        if world.rank == 0:
            with pytest.raises(PeerTimeout):
                world.between_meetings(work)
            world.timeout_s = 10
        world.between_meetings(work)

    assert on_ranks(2, step, timeout_s=0.3) == [None] * 2
    assert sorted(done) == [0, 1]


def test_who_is_neither_here_nor_absent_is_named() -> None:
    def step(world: World) -> None:
        if world.rank == 0:
            world.between_meetings(nothing, [1])

    outcome = on_ranks(3, step, timeout_s=0.3)[0]
    assert isinstance(outcome, PeerTimeout)
    assert outcome.peer == 2


class SlowToLook:
    """A store whose wait begins late."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wait(self, *given: Any) -> None:
        time.sleep(0.2)
        self._store.wait(*given)


def test_who_is_slow_to_leave_a_round_is_not_left_in_it() -> None:
    """Ranks that go on without it must not take away what it still looks at."""

    def step(world: World) -> None:
        if world.rank == 1:
            world._store = SlowToLook(world._store)  # type: ignore[assignment]
        for absent in ([], [1], [1], []):
            if world.rank not in absent:
                world.between_meetings(nothing, absent)

    assert on_ranks(2, step, timeout_s=3) == [None] * 2


def test_meetings_leave_no_keys_behind() -> None:
    def step(world: World) -> int:
        for absent in ([], [1], [1], [], []):
            if world.rank not in absent:
                world.between_meetings(nothing, absent)
        assert world._store is not None
        world.barrier()
        return world._store.num_keys()

    # Of each rank the last round's two meetings, a barrier, and a counter; of rank 0 the last round
    # without rank 1, too.
    assert max(on_ranks(2, step)) <= 2 * 4 + 2


def test_after_a_round_all_count_their_collectives_alike() -> None:
    """One gave up a collective that another had not begun: they would never meet again."""

    def step(world: World) -> list[bytes]:
        if world.rank == 0:
            with pytest.raises(PeerTimeout):
                world.barrier(timeout_s=0.1)
            with pytest.raises(PeerTimeout):
                world.barrier(timeout_s=0.1)
        world.between_meetings(nothing)
        return world.all_gather(str(world.rank).encode())

    assert on_ranks(3, step) == [[b"0", b"1", b"2"]] * 3


def test_what_ranks_say_at_different_places_is_no_answer() -> None:
    def step(world: World) -> str:
        if world.rank == 0:
            world.barrier()
            return ""
        with pytest.raises(GroupFault, match="rank 0 is at something else.*reset"):
            world.agree("allocating", nothing)
        return "told"

    assert on_ranks(2, step) == ["", "told"]
