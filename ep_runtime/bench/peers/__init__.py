"""Other libraries that dispatch and combine, measured in the same run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ep_runtime.bench.implementation import Implementation, Problem


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer to measure. `build` may raise: then the record says so.

    name         record's impl
    recv_format  how its receiver finds the rows
    """

    name: str
    recv_format: str
    build: Callable[[Problem], Implementation]


@dataclass(frozen=True, slots=True)
class Absent:
    """A peer that this machine does not have, and why."""

    name: str
    reason: str
