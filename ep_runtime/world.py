"""The ranks of a group and what they tell each other on the host: never on the path of a step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ep_runtime import env, errors
from ep_runtime.errors import ConfigError, EpError, GroupFault, PeerTimeout, ShapeError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MAX_LIMIT_S = 86400.0  # of a wait for peers

T = TypeVar("T")


class World:
    """Rank `rank` of `num_ranks`, joined by a torch.distributed Store (or alone, without one).

    Every collective must be called by all ranks in the same order. Every wait ends within
    `timeout_s` seconds: then PeerTimeout names the first rank that is missing.
    """

    def __init__(
        self, store: Store | None, rank: int, num_ranks: int, timeout_s: float | None = None
    ) -> None:
        ints = type(rank) is int and type(num_ranks) is int
        if not ints or num_ranks < 1 or not 0 <= rank < num_ranks:
            raise ConfigError(
                f"rank={rank} of num_ranks={num_ranks}: a rank is 0 .. num_ranks - 1; check what"
                " the launcher sets (RANK, WORLD_SIZE)"
            )
        if store is None and num_ranks > 1:
            raise ConfigError(
                f"num_ranks={num_ranks} without a store: pass World.from_store(store, ...) or"
                " World.from_env()"
            )
        self.rank = rank
        self.num_ranks = num_ranks
        self.members = list(range(num_ranks))  # what errors call the ranks
        self.timeout_s = env.read().warmup_timeout_s if timeout_s is None else limit_of(timeout_s)
        self._store = store
        self._calls = 0
        self._rounds: dict[tuple[int, ...], int] = {}  # finished, by who was left out
        self._stepped = ""  # the round whose step is done, if it is not finished
        self._given_up: set[str] = set()  # rounds that this rank began and did not finish
        self._parts = 0
        self._prefix = ""
        if store is not None:
            # The store counts, so worlds over one store stay apart and restarts get fresh keys.
            number = store.add(f"ep_runtime/worlds/{rank}", 1)
            self._prefix = f"ep_runtime/world{number}"

    @classmethod
    def single(cls) -> World:
        """A group of one."""
        return cls(None, 0, 1)

    @classmethod
    def from_store(
        cls, store: Store, rank: int, num_ranks: int, timeout_s: float | None = None
    ) -> World:
        """A group whose ranks reach the same `store`."""
        return cls(store, rank, num_ranks, timeout_s)

    @classmethod
    def from_env(cls, timeout_s: float | None = None) -> World:
        """The initialised torch.distributed default group, or else torchrun's variables."""
        if dist.is_initialized():
            group = dist.group.WORLD
            assert group is not None
            return cls(group.get_group_store(), dist.get_rank(), dist.get_world_size(), timeout_s)
        limit = env.read().warmup_timeout_s if timeout_s is None else limit_of(timeout_s)
        try:
            store, rank, num_ranks = next(
                iter(rendezvous("env://", timeout=timedelta(seconds=limit)))
            )
        except ValueError as error:
            raise ConfigError(
                f"no launcher set up this process ({error}); start it with torchrun, or use"
                " World.single() or World.from_store()"
            ) from error
        except dist.DistError as error:
            raise PeerTimeout(
                f"the launcher's store did not answer within {limit:g} s ({error}); check"
                " MASTER_ADDR and MASTER_PORT, and that rank 0 was started",
                rank=-1,
                peer=0,
            ) from error
        return cls(store, rank, num_ranks, timeout_s)

    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Every rank's `data`, by rank. `timeout_s` replaces the world's for this call."""
        limit_s = self.timeout_s if timeout_s is None else limit_of(timeout_s)
        if not isinstance(data, bytes):
            raise ShapeError(f"data is of type {type(data).__name__}: it must be bytes; encode it")
        self._calls += 1
        if self._store is None:
            return [data]
        keys = [f"{self._prefix}/{self._calls}/{rank}" for rank in range(self.num_ranks)]
        values = self._gather(self._store, keys, data, limit_s, f"collective {self._calls}")
        if self._calls > 1:
            # Everybody is in this collective, so nobody still reads the one before.
            self._store.delete_key(f"{self._prefix}/{self._calls - 1}/{self.rank}")
        return [value for value in values if value is not None]

    def between_meetings(self, step: Callable[[], None], absent: Collection[int] = ()) -> None:
        """Meet the ranks that are not in `absent`, run `step`, and meet them again.

        Raises PeerTimeout for a rank that is neither here nor absent, ConfigError if that one went
        on without other ranks. After that the whole may be called again: it goes on where it was,
        so who waited, gave up and comes again meets who came late. A rank that counts itself absent
        meets nobody.

        Whoever gave up in a collective before has counted more or fewer of them than others: from
        here on all count from the same one.
        """
        without = tuple(sorted(set(absent)))
        store = self._store
        if store is None or self.rank in without:
            step()
            return
        # Those who are left count the rounds that they had without just these.
        number = self._rounds.get(without, 0)
        place = f"without{list(without)}/{number}"
        said = f"{self._prefix}/without/{self.rank}"
        store.set(said, "=" + json.dumps(without))
        self._given_up.add(place)
        if self._stepped != place:
            self._meet_at(store, f"{place}/before", without)
            step()
            self._stepped = place
        counts = self._meet_at(store, f"{place}/after", without, str(self._calls).encode())
        self._calls = max(int(count) for count in counts if count is not None)
        self._stepped = ""
        self._rounds[without] = number + 1
        store.delete_key(said)
        # All have left the round before this one. Who was not here may still look at its last.
        for left in {*self._given_up, f"without{list(without)}/{number - 1}"} - {place}:
            for when in ("before", "after"):
                store.delete_key(f"{self._prefix}/{left}/{when}/{self.rank}")
        self._given_up.clear()

    def _meet_at(
        self, store: Store, place: str, without: tuple[int, ...], data: bytes = b""
    ) -> list[bytes | None]:
        keys = [
            "" if rank in without else f"{self._prefix}/{place}/{rank}"
            for rank in range(self.num_ranks)
        ]
        try:
            return self._gather(store, keys, data, self.timeout_s, f"meeting {place}")
        except PeerTimeout as error:
            said = f"{self._prefix}/without/{self.members.index(error.peer)}"
            if store.check([said]) and (theirs := json.loads(store.get(said)[1:])) != list(without):
                raise ConfigError(
                    f"rank {error.peer} goes on without ranks {theirs}, rank"
                    f" {self.members[self.rank]} without {list(without)}: mask the same ranks on"
                    " every rank that is left, then reset() again"
                ) from error
            raise

    def _gather(
        self, store: Store, keys: list[str], data: bytes, limit_s: float, what: str
    ) -> list[bytes | None]:
        try:
            return self._exchange(store, keys, data, limit_s, what)
        except dist.DistError as error:
            raise GroupFault(
                f"rank {self.members[self.rank]} lost the store that joins the ranks ({error}); its"
                " host (rank 0 or the launcher) is gone: end this process and start the group again"
            ) from error

    def _exchange(
        self, store: Store, keys: list[str], data: bytes, limit_s: float, what: str
    ) -> list[bytes | None]:
        """What is behind every key; a rank without a key is not asked."""
        # Never empty: not every store takes that. Any bytes are taken, the stub says str.
        store.set(keys[self.rank], b"=" + data)  # type: ignore[arg-type]
        started = time.monotonic()
        try:
            store.wait([key for key in keys if key], timedelta(seconds=limit_s))
        except RuntimeError as error:  # of a file: as such
            if isinstance(error, dist.DistError) and not isinstance(error, dist.DistStoreError):
                raise
            absent = next((r for r, key in enumerate(keys) if key and not store.check([key])), None)
            if absent is None:
                return _collect(store, keys)
            missing = self.members[absent]
            raise PeerTimeout(
                f"rank {missing} did not reach {what} within"
                f" {time.monotonic() - started:.1f} s (limit {limit_s:g} s); look at that"
                " rank's log, or raise EP_WARMUP_TIMEOUT_S if it was only slow",
                rank=self.members[self.rank],
                peer=missing,
            ) from error
        return _collect(store, keys)

    def part(self, members: Sequence[int]) -> World:
        """The world of some ranks of this one, in this order. Does not communicate.

        Every rank takes the same number of parts, each of them one that it is a member of.
        """
        if self.rank not in members or len(set(members)) != len(members):
            raise ShapeError(
                f"members={list(members)}: they must be distinct ranks, rank {self.rank} among them"
            )
        self._parts += 1
        return _PartWorld(self, members, f"{self._prefix}/part{self._parts}")

    def apart(self) -> World:
        """The same ranks, whose collectives are counted by themselves: for what some of them may
        leave out. Does not communicate; every rank takes it at the same place."""
        return _PartWorld(self, range(self.num_ranks), f"{self._prefix}/apart{self._calls}")

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """`data` of rank `root` (what other ranks pass is ignored)."""
        if type(root) is not int or not 0 <= root < self.num_ranks:
            raise ShapeError(f"root={root!r}: it must be a rank, 0 to {self.num_ranks - 1}")
        return self.all_gather(data if self.rank == root else b"")[root]

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return when every rank has called it. `timeout_s` replaces the world's."""
        self.all_gather(b"", timeout_s=timeout_s)

    def agree(self, what: str, step: Callable[[], T]) -> T:
        """Run `step` on every rank; if it fails on any rank, every rank raises.

        The rank that failed raises its own error, whatever it is; the others one that names it, of
        the same class, or GroupFault where the class is none of this package. So does a rank that
        has only waited for one that failed otherwise: its own PeerTimeout is the cause.
        """
        result: T
        failure: Exception | None = None
        try:
            result = step()
        except Exception as error:  # noqa: BLE001 - whatever it was, the others wait for an answer
            failure = error
        told = {} if failure is None else {"kind": type(failure).__name__, "text": _told(failure)}
        try:
            answers = self._answers(what, json.dumps(told).encode())
        except EpError:
            if failure is not None:
                raise failure  # noqa: B904 - what went wrong here counts; that nobody heard is context
            raise
        waited = isinstance(failure, PeerTimeout)
        for rank, answer in enumerate(answers):
            if answer and (failure is None or (waited and answer["kind"] != "PeerTimeout")):
                text = f"rank {self.members[rank]} failed at {what}: {answer['text']}"
                raise _same_kind(answer["kind"])(text) from failure
        if failure is not None:
            raise failure
        return result

    def _answers(self, what: str, mine: bytes) -> list[dict[str, str]]:
        answers = []
        for rank, text in enumerate(self.all_gather(mine)):
            try:
                answers.append(json.loads(text))
            except ValueError:
                raise GroupFault(
                    f"rank {self.members[rank]} is at something else while this rank is at {what}:"
                    " one of them has given up in a collective before; reset() on every rank, then"
                    " call it again on every rank"
                ) from None
        return answers


def is_time(seconds: object, least: float, most: float) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return False
    return least <= seconds <= most


def limit_of(seconds: float, most: float = MAX_LIMIT_S) -> float:
    """Of a wait. Stores count whole milliseconds, and some take 0 for no limit."""
    if not is_time(seconds, 0.001, most):
        raise ConfigError(
            f"timeout_s={seconds!r}: it must be a number of seconds from 0.001 to {most:g}"
        )
    return seconds


def _collect(store: Store, keys: list[str]) -> list[bytes | None]:
    return [bytes(store.get(key))[1:] if key else None for key in keys]


def _told(failure: Exception) -> str:
    """A failure as other ranks report it: with its class and a remedy where it brings none."""
    if isinstance(failure, EpError):
        return str(failure)
    return (
        f"{type(failure).__name__}: {failure}; look at that rank's traceback, then start the group"
        " again"
    )


def _same_kind(name: str) -> type[EpError]:
    kind = getattr(errors, name, GroupFault)
    if isinstance(kind, type) and issubclass(kind, EpError) and kind is not PeerTimeout:
        return kind
    return GroupFault


class _PartWorld(World):
    """Some ranks of a world, over the same store."""

    def __init__(self, whole: World, members: Sequence[int], prefix: str) -> None:
        super().__init__(None, 0, 1, whole.timeout_s)
        self.rank = list(members).index(whole.rank)
        self.num_ranks = len(members)
        self.members = [whole.members[member] for member in members]
        self._store = whole._store if self.num_ranks > 1 else None
        self._prefix = f"{prefix}/{'-'.join(map(str, self.members))}"


class VirtualWorld(World):
    """The world of a virtual rank: its peers are objects of this process, so nothing waits."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__(None, 0, 1)
        self.rank = rank
        self.num_ranks = num_ranks

    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        del timeout_s
        raise errors.SequenceError(
            f"all_gather of {len(data)} bytes on virtual rank {self.rank} of {self.num_ranks}: its"
            " peers share this thread and cannot wait for each other; exchange Python objects"
        )

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Nothing: one thread drives all ranks."""
        del timeout_s

    def apart(self) -> World:
        """This one: nothing is counted."""
        return self
