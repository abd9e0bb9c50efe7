"""Ranks that are threads: a reset() for which one was late comes to an end when called again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from ep_runtime import PeerTimeout
from ep_runtime.normal import NormalBuffer, virtual_normal_ranks


def test_reset_may_be_called_again_where_a_rank_was_late() -> None:
    buffers = virtual_normal_ranks(2, backend="host", max_tokens=4, max_hidden=256)

    def rank(buffer: NormalBuffer) -> int:
        buffer.world.timeout_s = 0.3
        time.sleep(0.7 * buffer.rank)  # rank 0 gives up twice
        tries = 0
        while True:
            tries += 1
            try:
                buffer.reset()
                break
            except PeerTimeout:
                continue
        buffer.world.timeout_s = 10.0
        buffer.reserve(max_tokens=64)  # collectives are counted alike again
        buffer.reset()
        return tries

    with ThreadPoolExecutor(2) as threads:
        tries = list(threads.map(rank, buffers))
    assert tries[0] > 1
    for buffer in buffers:
        buffer.close()
