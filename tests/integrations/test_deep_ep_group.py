"""What a Buffer takes for a group: one of torch.distributed, or an MPI communicator."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import Format, combine, dispatch
from test_deep_ep_interface import FakeComm
from traffic import Sizes

from ep_runtime.errors import PeerTimeout
from ep_runtime.integrations.deep_ep import Buffer, check_nvlink_connections, group

SIZES = Sizes(num_experts=8, topk=2, hidden=512, max_tokens=8)


class Recording(FakeComm):
    """Keeps what crossed; says that every rank is on a host of its own, or all on one."""

    def __init__(self, rank: Rank, hosts: list[str] | None = None) -> None:
        super().__init__(rank)
        self.hosts = hosts
        self.gathered: list[Any] = []

    def allgather(self, obj: Any) -> list[Any]:
        told = super().allgather(obj)
        if self.hosts is not None:
            told = [(boot, name) for (boot, _), name in zip(told, self.hosts, strict=True)]
        self.gathered.append(told)
        return told


def group_is(rank: Rank, seed: int) -> None:
    comm = Recording(rank)
    buffer = Buffer(None, low_latency_mode=True, explicitly_destroy=True, comm=comm)
    assert buffer.group is comm
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, Format(), "plain"))
    buffer.destroy()
    unused = Recording(rank)
    buffer = Buffer(rank.group, explicitly_destroy=True, comm=unused)  # as in DeepEP: group wins
    assert buffer.group is rank.group
    assert not unused.gathered
    buffer.destroy()


def test_the_group_attribute_is_what_was_given(pool: RankPool, seed: int) -> None:
    pool.run(group_is, seed)


def across_hosts(rank: Rank, seed: int) -> list[tuple[str, bool]]:
    """Returns where this rank looked for the store, and whether it opened it."""
    found: list[tuple[str, bool]] = []
    original = group.TCPStore

    def store(host: str, *arguments: Any, **options: Any) -> Any:
        found.append((host, options["is_master"]))
        return original(host, *arguments, **options)

    # A name of this machine that is none of the others': rank 0's is what the others must use.
    hosts = ["127.0.0.2", *(f"host-{number}" for number in range(1, rank.num_ranks))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "TCPStore", store)
        for names in (hosts, None):
            comm = Recording(rank, names)
            buffer = Buffer(None, low_latency_mode=True, explicitly_destroy=True, comm=comm)
            combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, Format(), "plain"))
            buffer.destroy()
            assert {len(told) for told in comm.gathered} == {rank.num_ranks}
    return found


def test_ranks_of_other_hosts_are_told_where_rank_0_is(pool: RankPool, seed: int) -> None:
    for number, found in enumerate(pool.run(across_hosts, seed)):
        masters = [is_master for _, is_master in found]
        assert masters == [number == 0] * 2
        if number:
            assert [host for host, _ in found] == ["127.0.0.2", "127.0.0.1"]


class Unreachable:
    """Rank 1 of two; nobody listens where rank 0 is said to be."""

    def Get_rank(self) -> int:  # noqa: N802
        return 1

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def allgather(self, obj: Any) -> list[Any]:
        return [obj, obj]

    def bcast(self, _obj: Any, root: int = 0) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1] + root


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_WARMUP_TIMEOUT_S", "1")
    with pytest.raises(PeerTimeout, match=r"127\.0\.0\.1:\d+.*1 s.*rank 0") as raised:
        Buffer(None, comm=Unreachable())
    assert (raised.value.rank, raised.value.peer) == (1, 0)


def test_links_are_not_asked_for_ahead() -> None:
    check_nvlink_connections(None)
