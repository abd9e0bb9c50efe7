"""Every test of this directory runs on every backend: `place` says where its ranks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpus import marks_of_many
from groups import (
    GPU_PLACES,
    HOST_PLACES,
    Group,
    Place,
    ProcessGroup,
    ProcessPool,
    VirtualGroup,
    multi_places,
)
from support import new_rng

from ep_runtime import EpConfig

OpenGroup = Callable[[EpConfig], Group]


def _params() -> Iterator[object]:
    for place in HOST_PLACES:
        yield pytest.param(place, id=place.name)
    for place in GPU_PLACES:
        yield pytest.param(place, id=place.name, marks=pytest.mark.gpu)
    for place in multi_places():
        marks = marks_of_many(place.kind, f"backends-{place.name}")
        yield pytest.param(place, id=place.name, marks=marks)


@pytest.fixture(params=_params(), scope="module")
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    return chosen


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[str, ProcessPool]]:
    """Processes, started when first asked for."""
    started: dict[str, ProcessPool] = {}
    yield started
    for pool in started.values():
        pool.stop()


@pytest.fixture
def open_group(place: Place, pools: dict[str, ProcessPool]) -> Iterator[OpenGroup]:
    """Makes groups of `place.num_ranks` ranks; closes them."""
    groups: list[Group] = []

    def make(config: EpConfig) -> Group:
        if place.kind == "virtual":
            group: Group = VirtualGroup(config, place.num_ranks, place.backend, place.devices)
        else:
            if place.name not in pools:
                pools[place.name] = ProcessPool(place.num_ranks, place.backend)
            group = ProcessGroup(config, pools[place.name])
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def rng() -> torch.Generator:
    return new_rng()
