"""Which peers this machine has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from ep_runtime.bench.implementation import Implementation, Problem
from ep_runtime.bench.options import PEERS
from ep_runtime.bench.peers import Absent, Peer, symmetric
from ep_runtime.bench.peers.collectives import Collectives
from ep_runtime.bench.session import Session


@dataclass(slots=True)
class Found:
    """Peers to measure, those that are not here, and what to call when the run is over."""

    peers: list[Peer]
    absent: list[Absent]
    close: Callable[[], None]


def find_peers(session: Session) -> Found:
    """Look for every peer that the options want. The same on all ranks of a homogeneous host."""
    if session.shares_gpus:
        reason = f"it takes one GPU per rank, and here {session.ranks_per_gpu} ranks share one"
        wanted = [name for name in PEERS if session.options.wants(name)]
        return Found([], [Absent(name, reason) for name in wanted], lambda: None)
    collectives = Collectives(session.options, session.group, session.device)
    peers, absent = collectives.find()
    for name in ("flashinfer", "deep_ep"):
        if not session.options.wants(name):
            continue
        found = _library(session, name)
        if isinstance(found, Absent):
            absent.append(found)
        else:
            peers.append(found)
    if session.options.wants(symmetric.NAME):  # last: it starts a library of its own
        more, missing = symmetric.find_symmetric(session.options, session.group, session.device)
        peers += more
        absent += missing
    return Found(peers, absent, collectives.close)


def _library(session: Session, name: str) -> Peer | Absent:
    """The adapter of a library, which imports it."""
    if session.device.type != "cuda":
        return Absent(name, "it needs GPUs")
    try:
        module = importlib.import_module(f"ep_runtime.bench.peers.{name}")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Absent(name, f"cannot be imported: {type(error).__name__}: {error}")

    def build(problem: Problem) -> Implementation:
        implementation: Implementation = module.build(session.options, session.group, problem)
        return implementation

    return Peer(name, module.RECV_FORMAT, build)
