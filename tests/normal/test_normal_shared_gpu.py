"""Two ranks and more to a GPU as real processes, under NVIDIA's MPS daemon."""

from __future__ import annotations

from collections.abc import Iterator

import programs
import pytest
import torch
from expect import check_combined, check_received, random_group, random_results
from gpus import sharing_ranks
from mps import daemon, share_of
from ranks import Processes, ProcessGroup
from support import new_rng

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

EXPERTS = 32
MOST_IN_ALL = 2400  # rows: what the reference has time for


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with daemon(tmp_path_factory.mktemp("mps")) as found:
        yield found


def pair(group: ProcessGroup, rng: torch.Generator, turn: int, most: int, hidden: int) -> None:
    worst = 0 if turn % 2 else most * group.num_ranks
    scales = "float32" if turn % 3 == 1 else None
    inputs = random_group(rng, group.num_ranks, hidden, 8, EXPERTS, most, scales=scales)
    options = {"num_experts": EXPERTS, "num_worst_tokens": worst, "expert_alignment": 1 + turn}
    group.run(programs.forget)
    group.run(programs.poison)
    got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
    expected = check_received(got, inputs, EXPERTS, alignment=1 + turn, worst=worst)
    rows, weights = random_results(rng, expected, hidden, 8, worst)
    back = group.run(programs.combine, [(y, w, []) for y, w in zip(rows, weights, strict=True)])
    tokens = [one.x.shape[0] for one in inputs]
    check_combined([y for y, _ in back], rows, expected, tokens)
    check_combined([w for _, w in back], weights, expected, tokens)


@pytest.mark.parametrize(
    ("num_ranks", "most", "hidden"),
    [
        *[(ranks, MOST_IN_ALL // max(8, ranks), 7168) for ranks in sharing_ranks()],
        pytest.param(2, 2000, 512, id="more rows than a combine has chunks"),
    ],
)
def test_processes_that_share_gpus_match_the_reference(
    mps: dict[str, str], num_ranks: int, most: int, hidden: int
) -> None:
    pool = Processes(num_ranks, "cuda", {**mps, **share_of(num_ranks), "EP_MEMORY": "ipc"})
    rng = new_rng()
    try:
        group = ProcessGroup(pool, max_tokens=most, max_experts=EXPERTS, max_topk=8)
        for turn in range(4):
            pair(group, rng, turn, most, hidden)
        group.close()
    finally:
        pool.stop()
