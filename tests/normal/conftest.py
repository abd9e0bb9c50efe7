"""Tests that take `open_group` run on every backend: `place` says where the ranks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpus import marks_of_many
from node_places import nodes as nodes
from node_places import open_pair as open_pair
from ranks import GPU_PLACES, HOST_PLACES, Group, Place, Processes, ProcessGroup, multi_places
from ranks import ThreadGroup as VirtualGroup
from support import new_rng

OpenGroup = Callable[..., Group]


def _params() -> Iterator[object]:
    for place in HOST_PLACES:
        yield pytest.param(place, id=place.name)
    for place in GPU_PLACES:
        yield pytest.param(place, id=place.name, marks=pytest.mark.gpu)
    for place in multi_places():
        marks = marks_of_many(place.kind, f"normal-{place.name}")
        yield pytest.param(place, id=place.name, marks=marks)


@pytest.fixture(params=_params(), scope="module")
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    return chosen


@pytest.fixture(scope="session")
def normal_pools() -> Iterator[dict[str, Processes]]:
    """Processes, started when first asked for."""
    started: dict[str, Processes] = {}
    yield started
    for pool in started.values():
        pool.stop()


@pytest.fixture
def open_group(place: Place, normal_pools: dict[str, Processes]) -> Iterator[OpenGroup]:
    """Makes groups of `place.num_ranks` ranks; closes them."""
    groups: list[Group] = []

    def make(**sizes: Any) -> Group:
        if place.kind == "threads":
            group: Group = VirtualGroup(place.num_ranks, place.backend, place.devices, **sizes)
        else:
            if place.name not in normal_pools:
                normal_pools[place.name] = Processes(place.num_ranks, place.backend)
            group = ProcessGroup(normal_pools[place.name], **sizes)
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def rng() -> torch.Generator:
    return new_rng()
