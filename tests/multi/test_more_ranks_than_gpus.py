"""Two ranks and more to a GPU as real processes, under NVIDIA's MPS daemon.

Every process gets its share of the SMs, so that one rank's waits cannot keep another's sends from
starting; without the daemon ranks of one GPU would take turns, milliseconds at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpus import sharing_ranks
from groups import ProcessGroup, ProcessPool
from mps import daemon, share_of
from support import (
    check_combined,
    check_received,
    new_rng,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, reference

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with daemon(tmp_path_factory.mktemp("mps")) as found:
        yield found


@pytest.mark.parametrize("num_ranks", sharing_ranks())
def test_processes_that_share_gpus_match_the_reference(mps: dict[str, str], num_ranks: int) -> None:
    pool = ProcessPool(
        num_ranks, "cuda", environment={**mps, **share_of(num_ranks), "EP_MEMORY": "ipc"}
    )
    rng = new_rng()
    config = EpConfig(num_experts=32, topk=8, hidden=7168, max_tokens=32)
    try:
        group = ProcessGroup(config, pool)
        for turn in range(6):
            inputs = random_inputs(rng, config, num_ranks, padded=True)
            expected = reference.dispatch(config, inputs)
            fused = turn % 2 == 1
            dispatch = group.dispatch_fused if fused else group.dispatch
            combine = group.combine_fused if fused else group.combine
            check_received(dispatch(inputs, turn % 2), expected)
            outputs = random_outputs(rng, expected)
            check_combined(combine(outputs, turn % 2), config, inputs, outputs)
        group.close()
    finally:
        pool.stop()
