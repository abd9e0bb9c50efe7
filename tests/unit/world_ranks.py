"""Ranks of a World as threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore

from ep_runtime import World


def on_ranks(num_ranks: int, step: Callable[[World], Any], timeout_s: float = 10) -> list[Any]:
    """Run `step` on every rank of a world of threads; results or exceptions."""
    store = HashStore()

    def run(rank: int) -> Any:
        try:
            return step(World.from_store(store, rank, num_ranks, timeout_s))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))
