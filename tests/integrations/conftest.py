"""Groups of two and four CPU ranks, of two ranks on one GPU or two, and of one on every GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deep_ep_ranks import RankPool
from gpus import num_gpus
from mps import daemon, share_of

PLACES = ["host-2", "host-4", pytest.param("cuda-2", marks=[pytest.mark.gpu, pytest.mark.alone])]
if num_gpus() > 2:
    PLACES.append(pytest.param(f"cuda-{num_gpus()}", marks=pytest.mark.multi))

_pools: dict[str, RankPool] = {}


@pytest.fixture(scope="session")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of two processes that run at the same time; on two GPUs they do by themselves."""
    if torch.cuda.device_count() != 1:
        yield {}
        return
    with daemon(tmp_path_factory.mktemp("mps")) as found:
        yield {**found, **share_of(2)}
        _stop("cuda-2")


def _stop(name: str) -> None:
    pool = _pools.pop(name, None)
    if pool is not None:
        pool.stop()


@pytest.fixture(scope="session", autouse=True)
def _pools_end() -> Iterator[None]:
    yield
    for name in list(_pools):
        _stop(name)


@pytest.fixture(params=PLACES)
def pool(request: pytest.FixtureRequest) -> RankPool:
    """Ranks, started when first asked for, and again after a test that broke them."""
    return _pool(request, request.param)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> RankPool:
    """Two CPU ranks, for what does not depend on the place."""
    return _pool(request, "host-2")


@pytest.fixture
def gpu_pair(request: pytest.FixtureRequest) -> RankPool:
    """Two GPU ranks; for tests marked gpu."""
    return _pool(request, "cuda-2")


def _pool(request: pytest.FixtureRequest, name: str) -> RankPool:
    pool = _pools.get(name)
    if pool is None or pool.stopped:
        where, size = name.split("-")
        environment = {"EP_WARMUP_TIMEOUT_S": "30"}
        if where == "cuda":
            environment |= {**request.getfixturevalue("mps"), "EP_MEMORY": "ipc"}
        pool = _pools[name] = RankPool(int(size), where == "cuda", environment)
    return pool


@pytest.fixture
def seed() -> int:
    """Fresh inputs in every run; printed with a failure."""
    value = int(torch.seed() % 2**31)
    print(f"seed {value}")
    return value


@pytest.fixture(scope="session")
def checkout() -> Path:
    return Path(__file__).resolve().parents[2]
