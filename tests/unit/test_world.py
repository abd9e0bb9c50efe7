"""Ranks that meet over a store: all of them, or an error that names who is missing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore, HashStore
from world_ranks import on_ranks

from ep_runtime import ConfigError, GroupFault, PeerTimeout, SequenceError, ShapeError, World
from ep_runtime.world import VirtualWorld


def test_all_gather_orders_by_rank_and_takes_any_bytes() -> None:
    def step(world: World) -> list[list[bytes]]:
        mine = [b"", bytes(range(256)), b"x" * 100_000]
        return [world.all_gather(mine[(world.rank + i) % 3]) for i in range(3)]

    for result in on_ranks(3, step):
        assert result[0] == [b"", bytes(range(256)), b"x" * 100_000]
        assert result[1][2] == b""


def test_broadcast_gives_the_roots_bytes() -> None:
    results = on_ranks(3, lambda w: w.broadcast(f"from {w.rank}".encode(), root=1))
    assert results == [b"from 1"] * 3


def test_missing_rank_is_named_within_the_limit() -> None:
    started = time.monotonic()

    def step(world: World) -> None:
        if world.rank not in (1, 3):
            world.barrier()

    results = on_ranks(4, step, timeout_s=0.5)
    assert time.monotonic() - started < 5
    for rank in (0, 2):
        assert isinstance(results[rank], PeerTimeout)
        assert (results[rank].rank, results[rank].peer) == (rank, 1)
        assert "0.5 s" in str(results[rank])


def test_worlds_over_one_store_stay_apart() -> None:
    def step(first: World) -> list[list[bytes]]:
        assert first._store is not None
        second = World.from_store(first._store, first.rank, 2, 10)
        return [second.all_gather(b"second"), first.all_gather(b"first")]

    assert on_ranks(2, step) == [[[b"second"] * 2, [b"first"] * 2]] * 2


def test_store_keeps_no_keys_of_finished_collectives() -> None:
    def step(world: World) -> int:
        for _ in range(20):
            world.barrier()
        assert world._store is not None
        return world._store.num_keys()

    # Two live collectives at most, and a counter, per rank.
    assert max(on_ranks(2, step)) <= 2 * 3


def test_failure_on_one_rank_is_raised_on_all() -> None:
    def step(world: World) -> None:
        def allocate() -> None:
            if world.rank == 1:
                raise ConfigError("no room")

        world.agree("allocating", allocate)

    results = on_ranks(3, step)
    assert [type(r) for r in results] == [ConfigError] * 3
    assert str(results[1]) == "no room"
    assert str(results[0]) == str(results[2]) == "rank 1 failed at allocating: no room"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("7"), KeyError("boom"), AssertionError()],
    ids=lambda error: type(error).__name__,
)
def test_foreign_exception_reaches_the_others_as_a_group_fault(error: Exception) -> None:
    """At once, and not as advice to rebuild: nobody knows what it was."""
    started = time.monotonic()

    def step(world: World) -> list[bytes]:
        def attach() -> None:
            if world.rank == 0:
                raise error

        try:
            world.agree("attaching", attach)
        finally:
            told = world.all_gather(b"still in step")
        return told

    results = on_ranks(2, step)
    assert time.monotonic() - started < 5
    assert results[0] is error
    assert type(results[1]) is GroupFault
    assert str(results[1]).startswith(
        f"rank 0 failed at attaching: {type(error).__name__}: {error};"
    )


def test_a_timeout_of_one_rank_reaches_the_others_as_a_group_fault() -> None:
    """It names a peer that they did not wait for themselves."""

    def step(world: World) -> None:
        def wait() -> None:
            if world.rank == 0:
                raise PeerTimeout("rank 7 did not come", rank=0, peer=7)

        world.agree("waiting", wait)

    results = on_ranks(2, step)
    assert [type(one) for one in results] == [PeerTimeout, GroupFault]


def test_who_only_waited_hears_what_failed_first() -> None:
    def step(world: World) -> None:
        def work() -> None:
            if world.rank == 0:
                raise LookupError("no such layer")
            raise PeerTimeout("rank 0 did not come", rank=world.rank, peer=0)

        world.agree("warming up", work)

    first, *others = on_ranks(3, step)
    assert isinstance(first, LookupError)
    for fault in others:
        assert type(fault) is GroupFault
        assert str(fault).startswith("rank 0 failed at warming up: LookupError: no such layer")
        assert isinstance(fault.__cause__, PeerTimeout)


def test_a_failure_that_nobody_hears_of_is_still_raised() -> None:
    """Rank 1 never comes: what failed on rank 0 matters more."""

    def step(world: World) -> None:
        if world.rank == 0:
            world.agree("loading", lambda: {}["weights"])

    failure = on_ranks(2, step, timeout_s=0.2)[0]
    assert isinstance(failure, KeyError)
    assert isinstance(failure.__context__, PeerTimeout)


def test_agree_returns_the_ranks_own_value() -> None:
    assert on_ranks(3, lambda w: w.agree("counting", lambda: w.rank * 10)) == [0, 10, 20]


def test_single_rank_never_waits() -> None:
    world = World.single()
    world.barrier()
    assert world.all_gather(b"me") == [b"me"]
    assert world.broadcast(b"me") == b"me"


@pytest.mark.parametrize(("rank", "num_ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_outside_the_world_is_refused(rank: int, num_ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank} of num_ranks={num_ranks}"):
        World.from_store(HashStore(), rank, num_ranks)


@pytest.mark.parametrize("rank", [True, 0.0, "0", None])
def test_a_rank_is_an_int(rank: Any) -> None:
    with pytest.raises(ConfigError, match="of num_ranks=2"):
        World.from_store(HashStore(), rank, 2)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), 1e-4, True, "5"])
def test_a_limit_is_a_time(limit: Any) -> None:
    """Some stores wait for ever where it is 0."""
    with pytest.raises(ConfigError, match="timeout_s=.* from 0.001 to 86400"):
        World.from_store(HashStore(), 0, 2, limit)
    with pytest.raises(ConfigError, match="timeout_s="):
        World.from_env(limit)
    with pytest.raises(ConfigError, match="timeout_s="):
        World.from_store(HashStore(), 0, 2).barrier(timeout_s=limit)


def test_a_refused_collective_does_not_count() -> None:
    def step(world: World) -> list[bytes]:
        if world.rank == 0:
            with pytest.raises(ShapeError, match="data is of type str: it must be bytes"):
                world.all_gather("text")  # type: ignore[arg-type]
            for root in (-1, 2, True, 0.0):
                with pytest.raises(ShapeError, match="root=.* a rank, 0 to 1"):
                    world.broadcast(b"", root)  # type: ignore[arg-type]
            for members in ([1], [0, 0, 1]):
                with pytest.raises(ShapeError, match="distinct ranks, rank 0 among them"):
                    world.part(members)
        whole = world.part([0, 1])
        return [*world.all_gather(b"%d" % world.rank), *whole.all_gather(b"%d" % world.rank)]

    assert on_ranks(2, step, timeout_s=5) == [[b"0", b"1"] * 2] * 2


def test_many_ranks_need_a_store() -> None:
    with pytest.raises(ConfigError, match="without a store"):
        World(None, 0, 2)


def test_no_launcher_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        World.from_env()


def test_launcher_variables_make_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    world = World.from_env(timeout_s=5)
    assert (world.rank, world.num_ranks) == (0, 1)
    world.barrier()


def test_initialised_process_group_makes_a_world() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):  # a second world over the same store has keys of its own
            world = World.from_env()
            assert (world.rank, world.num_ranks) == (0, 1)
            assert world.all_gather(b"x") == [b"x"]
    finally:
        dist.destroy_process_group()


class _DroppedConnection(HashStore):
    """A store whose server is gone."""

    def set(self, *_: object) -> None:
        raise dist.DistNetworkError("Broken pipe")


def test_lost_store_is_a_group_fault() -> None:
    world = World.from_store(_DroppedConnection(), 0, 2, 1)
    with pytest.raises(GroupFault, match="lost the store"):
        world.barrier()


def test_virtual_ranks_do_not_gather() -> None:
    world = VirtualWorld(1, 4)
    world.barrier()
    with pytest.raises(SequenceError, match="virtual rank 1 of 4"):
        world.all_gather(b"")


def test_a_late_rank_does_not_shift_later_collectives() -> None:
    """A rank that gave up once still meets the others afterwards."""
    late = threading.Event()

    def step(world: World) -> list[bytes]:
        if world.rank == 1:
            late.wait(5)
        try:
            world.all_gather(b"first")
        except PeerTimeout:
            late.set()
        return world.all_gather(f"{world.rank}".encode(), timeout_s=10)

    assert on_ranks(2, step, timeout_s=0.3) == [[b"0", b"1"]] * 2


def test_a_part_names_ranks_as_the_whole_does() -> None:
    def step(world: World) -> None:
        def work() -> None:
            if world.rank == 3:
                raise OSError("no room")

        if world.rank >= 2:
            world.part([2, 3]).agree("working", work)

    outcomes = on_ranks(4, step)
    assert "rank 3 failed at working" in str(outcomes[2])


def test_collectives_apart_are_counted_apart() -> None:
    def step(world: World) -> list[bytes]:
        apart = world.apart()
        if world.rank == 0:
            with pytest.raises(PeerTimeout):
                apart.barrier(timeout_s=0.1)
        return world.all_gather(f"{world.rank}".encode())

    assert on_ranks(2, step) == [[b"0", b"1"]] * 2


def test_a_store_in_a_file_names_who_is_missing(tmp_path: Path) -> None:
    world = World.from_store(FileStore(str(tmp_path / "store"), 2), 0, 2, timeout_s=0.2)
    with pytest.raises(PeerTimeout) as caught:
        world.barrier()
    assert caught.value.peer == 1
