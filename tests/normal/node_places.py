"""Where groups with nodes run: the fixtures `nodes` and `open_pair`, which conftest.py offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gpus import marks_of_many, num_gpus
from node_groups import NodePlace, Pair
from ranks import Group, Place, Processes, ProcessGroup, ThreadGroup

from ep_runtime.normal.nodes_flat import sum_by_nodes as sum_of_flat_groups
from ep_runtime.normal.ops import Tables

OpenPair = Callable[..., Pair]
MOST = 40

HOST = [
    NodePlace(Place("threads", "host", 4), 2),
    NodePlace(Place("threads", "host", 4), 1),
    NodePlace(Place("threads", "host", 6), 3, "puts"),
    NodePlace(Place("threads", "host", 8), 4),
    NodePlace(Place("threads", "host", 8), 2, "puts"),
    NodePlace(Place("processes", "host", 4), 2),
    NodePlace(Place("processes", "host", 4), 2, "puts"),
]
GPU = [
    NodePlace(Place("threads", "cuda", 4, (0,)), 2),
    NodePlace(Place("threads", "cuda", 4, (0,)), 2, "puts"),
    NodePlace(Place("threads", "cuda", 4, (0,)), 1, "puts"),
]
MULTI = [
    NodePlace(Place("threads", "cuda", 4, (0, 1)), 2),  # each node on both GPUs
    NodePlace(Place("threads", "cuda", 4, (0, 0, 1, 1)), 2, "puts"),  # a GPU each
    *[NodePlace(Place("processes", "cuda", n), n // 2, "puts") for n in [num_gpus()]],
]


def _params() -> Iterator[object]:
    for places, marks in ((HOST, ()), (GPU, (pytest.mark.gpu,))):
        for one in places:
            yield pytest.param(one, id=one.name, marks=marks)
    for one in MULTI:
        yield pytest.param(one, id=one.name, marks=marks_of_many(one.place.kind, one.name))


@pytest.fixture(params=_params(), scope="module")
def nodes(request: pytest.FixtureRequest) -> NodePlace:
    chosen: NodePlace = request.param
    return chosen


def load_torch_kernels(devices: Sequence[int]) -> None:
    """Those of the flat groups' sum: torch would load them while ranks wait for each other."""
    for device in set(devices):
        zeros = torch.zeros((4, 8), dtype=torch.int32, device=torch.device("cuda", device))
        rows = zeros.bfloat16()
        sum_of_flat_groups(
            lambda _tables, _rows, _weights: None,
            Tables(zeros, zeros),
            4,
            [rows],
            rows,
            zeros.float(),
        )
        torch.cuda.synchronize(device)


@pytest.fixture
def open_pair(nodes: NodePlace, normal_pools: dict[str, Processes]) -> Iterator[OpenPair]:
    groups: list[Group] = []
    if nodes.place.backend == "cuda" and nodes.place.kind == "threads":
        load_torch_kernels(nodes.place.devices or ())

    def one(between: str, **sizes: Any) -> Group:
        place = nodes.place
        sizes |= {"ranks_per_node": nodes.ranks_per_node, "between_nodes": between}
        if place.kind == "threads":
            made: Group = ThreadGroup(place.num_ranks, place.backend, place.devices, **sizes)
        else:
            # A process holds one buffer: each of the two groups has processes of its own.
            name = f"{place.name}-{between}"
            if name not in normal_pools:
                normal_pools[name] = Processes(place.num_ranks, place.backend)
            made = ProcessGroup(normal_pools[name], **sizes)
        groups.append(made)
        return made

    def make(**sizes: Any) -> Pair:
        given = {"max_tokens": MOST, "max_hidden": 1024, "max_experts": 64, **sizes}
        return Pair(one(nodes.between, **given), one("flat", **given))

    yield make
    for group in groups:
        group.close()
