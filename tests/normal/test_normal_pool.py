"""The books of the pool: which stretch of a data heap belongs to whom."""

from __future__ import annotations

import torch

from ep_runtime.normal.pool import Pool


def test_the_pool_gives_out_every_byte_once() -> None:
    """Random blocks come, some are divided, and go; no two overlap, and all of it comes back."""
    rng = torch.Generator()
    rng.seed()
    pool = Pool(256, 128 * 100)
    alive: list[tuple[int, int, object]] = []
    for _ in range(2000):
        if alive and torch.rand((), generator=rng) < 0.5:
            _, _, block = alive.pop(int(torch.randint(len(alive), (), generator=rng)))
            pool.give_back(block, None)  # type: ignore[arg-type]
            continue
        size = int(torch.randint(1, 128 * 20, (), generator=rng))
        new = pool.allocate(size, capturing=False)
        if new is None:
            continue
        assert new.num_bytes >= size
        assert new.offset % 128 == 0
        assert new.offset >= 256
        assert new.offset + new.num_bytes <= 256 + 128 * 100
        made = [new]
        if torch.rand((), generator=rng) < 0.5:
            before, blocks, whole = pool.in_use - new.num_bytes, pool.blocks, new.num_bytes
            first = int(torch.randint(1, whole // 128 + 1, (), generator=rng)) * 128
            second = int(torch.randint(whole - first + 1, (), generator=rng))
            other = pool.divide(new, first, second)
            assert new.num_bytes == first
            assert (other is None) == (second == 0)
            if other is not None:
                assert other.offset == new.offset + first
                assert other.num_bytes == -(-second // 128) * 128
                made.append(other)
            assert pool.in_use == before + sum(one.num_bytes for one in made)
            assert pool.blocks == blocks - 1 + len(made)
        for one in made:
            for start, end, _ in alive:
                assert one.offset + one.num_bytes <= start or end <= one.offset
            alive.append((one.offset, one.offset + one.num_bytes, one))
    for _, _, block in alive:
        pool.give_back(block, None)  # type: ignore[arg-type]
    assert pool.in_use == pool.blocks == 0
    assert pool.allocate(128 * 100, capturing=False) is not None


def test_events_of_a_divided_block_stay_with_all_parts() -> None:
    pool = Pool(0, 384)
    block = pool.allocate(384, capturing=False)
    assert block is not None
    pool.give_back(block, (1, "event"))
    again = pool.allocate(384, capturing=False)
    assert again is not None
    other = pool.divide(again, 128, 100)
    rest = pool.allocate(128, capturing=False)
    assert other is not None
    assert rest is not None
    assert (again.num_bytes, other.offset, other.num_bytes, rest.offset) == (128, 128, 128, 256)
    assert set(again.uses) == set(other.uses) == set(rest.uses) == {1}


def test_each_part_of_a_divided_block_goes_back_by_itself() -> None:
    pool = Pool(0, 384)
    first = pool.allocate(384, capturing=False)
    assert first is not None
    second = pool.divide(first, 128, 256)
    assert second is not None
    pool.give_back(second, (1, "event"))
    assert (pool.in_use, pool.blocks) == (128, 1)
    again = pool.allocate(256, capturing=False)  # while the first part is held
    assert again is not None
    assert (again.offset, set(again.uses)) == (128, {1})
    assert pool.allocate(128, capturing=False) is None
    pool.give_back(first, (2, "event"))
    assert (pool.in_use, pool.blocks) == (256, 1)
    assert pool.allocate(128, capturing=False) is not None


def test_parts_of_a_capture_serve_captures_alone() -> None:
    pool = Pool(0, 512)
    first = pool.allocate(384, capturing=True)
    assert first is not None
    second = pool.divide(first, 128, 128)
    assert second is not None
    for part in (second, first):
        pool.give_back(part, None)
    assert (pool.in_use, pool.blocks) == (384, 0)  # replays write to it, and to what was left over
    assert pool.allocate(256, capturing=False) is None
    again = pool.allocate(384, capturing=True)
    assert again is not None
    assert again.offset == 0


def test_memory_of_captures_serves_captures_alone() -> None:
    pool = Pool(0, 256)
    block = pool.allocate(128, capturing=True)
    assert block is not None
    pool.give_back(block, None)
    assert pool.in_use == 128  # a replay writes to it
    eager = pool.allocate(128, capturing=False)
    assert eager is not None
    assert eager.offset != block.offset
    assert pool.allocate(128, capturing=False) is None
    again = pool.allocate(128, capturing=True)
    assert again is not None
    assert again.offset == block.offset


def test_events_of_freed_memory_reach_its_next_owner() -> None:
    pool = Pool(0, 384)
    a, b = pool.allocate(128, capturing=False), pool.allocate(128, capturing=False)
    assert a is not None
    assert b is not None
    pool.give_back(a, (1, "early"))
    pool.give_back(b, (2, "other"))
    whole = pool.allocate(384, capturing=False)
    assert whole is not None
    assert {stream: event for stream, (_, event) in whole.uses.items()} == {1: "early", 2: "other"}
    pool.give_back(whole, (1, "late"))
    part = pool.allocate(128, capturing=False)
    assert part is not None
    assert {stream: event for stream, (_, event) in part.uses.items()} == {1: "late"}
