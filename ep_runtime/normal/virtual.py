"""Several ranks of a normal buffer in one process, each driven by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

import torch

from ep_runtime.connect import Backend, choose_device
from ep_runtime.errors import ConfigError, PeerTimeout
from ep_runtime.memory import MemorySizes, RankMemory
from ep_runtime.memory.virtual import virtual_cuda_memory, virtual_host_memory
from ep_runtime.normal.buffer import NormalBuffer
from ep_runtime.normal.config import BetweenNodes, NormalConfig
from ep_runtime.normal.group import most_sms, resolve_virtual
from ep_runtime.normal.tuned import DEFAULT_SMS, TunedSms
from ep_runtime.world import World

Place = int | tuple[int, str]  # a collective, or a part of a round


class _Meeting:
    """Where the threads of a group leave what they tell each other."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.told: dict[Place, dict[int, bytes]] = {}
        self.left: dict[Place, int] = {}
        self.parts: dict[tuple[int, ...], _Meeting] = {}

    def of(self, members: Sequence[int]) -> _Meeting:
        """Where the threads of some of the ranks meet."""
        with self.changed:
            return self.parts.setdefault(tuple(members), _Meeting())


class ThreadWorld(World):
    """The world of a virtual rank whose peers are other threads of this process."""

    def __init__(self, rank: int, num_ranks: int, meeting: _Meeting) -> None:
        super().__init__(None, 0, 1)
        self.rank = rank
        self.num_ranks = num_ranks
        self.members = list(range(num_ranks))
        self._meeting = meeting

    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's `data`, by rank. Raises PeerTimeout naming the first that is missing."""
        self._calls += 1
        limit = self.timeout_s if timeout_s is None else timeout_s
        return self._exchange_at(self._calls, f"collective {self._calls}", data, limit)

    def _exchange_at(self, place: Place, what: str, data: bytes, limit: float) -> list[bytes]:
        meeting = self._meeting
        deadline = time.monotonic() + limit
        with meeting.changed:
            told = meeting.told.setdefault(place, {})
            told[self.rank] = data
            meeting.changed.notify_all()
            while len(told) < self.num_ranks:
                if not meeting.changed.wait(deadline - time.monotonic()):
                    missing = self.members[min(set(range(self.num_ranks)) - set(told))]
                    raise PeerTimeout(
                        f"the thread of rank {missing} did not reach {what} within"
                        f" {limit:g} s; call it on every rank, each in its own thread",
                        rank=self.members[self.rank],
                        peer=missing,
                    )
            meeting.left[place] = meeting.left.get(place, 0) + 1
            if meeting.left[place] == self.num_ranks:
                del meeting.told[place], meeting.left[place]
        return [told[rank] for rank in range(self.num_ranks)]

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return when the thread of every rank has called it."""
        self.all_gather(b"", timeout_s=timeout_s)

    def between_meetings(self, step: Callable[[], None], absent: Collection[int] = ()) -> None:
        """As World's: may be called again where a rank did not come. Normal operations have no
        masks: nobody is absent."""
        del absent
        number = self._rounds.get((), 0)
        if self._stepped != str(number):
            self._exchange_at((number, "before"), f"meeting {number}", b"", self.timeout_s)
            step()
            self._stepped = str(number)
        mine = str(self._calls).encode()
        counts = self._exchange_at((number, "after"), f"meeting {number}", mine, self.timeout_s)
        self._calls = max(int(count) for count in counts)
        self._stepped = ""
        self._rounds[()] = number + 1
        with self._meeting.changed:  # of collectives in which somebody gave up
            for place in [p for p in self._meeting.told if isinstance(p, int) and p <= self._calls]:
                del self._meeting.told[place]
                self._meeting.left.pop(place, None)

    def apart(self) -> World:
        """This one: threads of a process end together."""
        return self

    def part(self, members: Sequence[int]) -> ThreadWorld:
        """The world of some ranks of this one."""
        number = list(members).index(self.rank)
        world = ThreadWorld(number, len(members), self._meeting.of(members))
        world.members = [self.members[member] for member in members]
        return world


class _SharedHeaps:
    """Makes memory for all ranks of a world at once, when the first of them asks."""

    def __init__(self, make: Callable[[MemorySizes], list[RankMemory]], num_ranks: int) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._asked = [0] * num_ranks
        self._made: dict[int, dict[int, RankMemory]] = {}

    def get(self, rank: int, sizes: MemorySizes) -> RankMemory:
        """The rank's part of its next generation; every rank asks for the same sizes."""
        with self._lock:
            generation = self._asked[rank]
            if generation not in self._made:
                self._made[generation] = dict(enumerate(self._make(sizes)))
            self._asked[rank] += 1
            memory = self._made[generation].pop(rank)
            if not self._made[generation]:
                del self._made[generation]
            return memory


def virtual_normal_ranks(
    num_ranks: int,
    *,
    max_tokens: int,
    max_hidden: int = 7168,
    max_experts: int = 1024,
    max_topk: int = 32,
    pool_bytes: int | None = None,
    ranks_per_node: int | None = None,
    between_nodes: BetweenNodes = "auto",
    num_sms: int | None = None,
    backend: Backend = "auto",
    devices: Sequence[int] | None = None,
) -> list[NormalBuffer]:
    """`num_ranks` ranks of this process, rank r on GPU devices[r % len(devices)] (or on the CPU).

    Drive each from a thread of its own, on a GPU each on a stream of its own: an operation of one
    rank waits for the others. Ranks that share a GPU share its SMs, so that all their kernels run
    at the same time: each takes at most sm_count // ranks_on_that_GPU. Arguments otherwise as of
    NormalBuffer. Raises ConfigError, or BuildError where the devices cannot reach each other.
    """
    config = NormalConfig(
        max_tokens=max_tokens,
        max_hidden=max_hidden,
        max_experts=max_experts,
        max_topk=max_topk,
        pool_bytes=pool_bytes,
        ranks_per_node=ranks_per_node,
        between_nodes=between_nodes,
    )
    config.validate_for(num_ranks)
    placement = _placement(num_ranks, backend, devices)
    on_host = placement[0].type == "cpu"
    config = resolve_virtual(config)
    heaps: dict[tuple[int, ...], _SharedHeaps] = {}

    def memory(world: World, sizes: MemorySizes) -> RankMemory:
        members = tuple(world.members)

        def make(sizes: MemorySizes) -> list[RankMemory]:
            if on_host:
                return virtual_host_memory(len(members), sizes)
            return virtual_cuda_memory([placement[member].index for member in members], sizes)

        shared = heaps.setdefault(members, _SharedHeaps(make, len(members)))
        return shared.get(world.rank, sizes)

    meeting = _Meeting()
    sms = DEFAULT_SMS if num_sms is None else num_sms
    wanted = TunedSms(sms, sms)
    return [
        NormalBuffer._virtual(
            config,
            ThreadWorld(rank, num_ranks, meeting),
            device,
            memory,
            wanted,
            most_sms(device, placement.count(device)),
        )
        for rank, device in enumerate(placement)
    ]


def _placement(
    num_ranks: int, backend: Backend, devices: Sequence[int] | None
) -> list[torch.device]:
    if devices is not None and not devices:
        raise ConfigError("devices=[]: give at least one GPU index, or None for the current GPU")
    first = choose_device(backend, None if devices is None else devices[0])
    if first.type == "cpu":
        return [first] * num_ranks
    chosen = [first.index] if devices is None else list(devices)
    return [choose_device("cuda", chosen[rank % len(chosen)]) for rank in range(num_ranks)]
