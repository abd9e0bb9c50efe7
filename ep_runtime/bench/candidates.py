"""What stands in line to be measured: our Buffer in its variants, then the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

from ep_runtime.bench.implementation import Implementation, Problem
from ep_runtime.bench.options import LowLatencyOptions, Mode
from ep_runtime.bench.ours import Buffers, OurBuffer
from ep_runtime.bench.peers import Peer
from ep_runtime.bench.session import Session
from ep_runtime.config import CombineFormat, DispatchFormat, EpConfig, RecvFormat

OURS = "ep_runtime"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An implementation to build for a problem. `drop`: what to do after a failure."""

    name: str
    mode: str
    recv_format: str
    num_sms: int
    build: Callable[[Problem], Implementation]
    drop: Callable[[], None]
    combine_format: str = "bf16"


def our_candidates(session: Session, buffers: Buffers) -> list[Candidate]:
    """Every combine format, receive format and mode of the options."""
    options = session.options
    return [
        Candidate(
            OURS if combine_format == "bf16" else f"{OURS}-{combine_format}-combine",
            mode,
            recv_format,
            session.num_sms,
            partial(_build_ours, buffers, options, combine_format, recv_format, mode),
            buffers.drop,
            combine_format,
        )
        for combine_format, recv_format, mode in product(
            options.combine_formats, options.recv_formats, options.modes
        )
    ]


def _build_ours(
    buffers: Buffers,
    options: LowLatencyOptions,
    combine_format: str,
    recv_format: str,
    mode: Mode,
    problem: Problem,
) -> Implementation:
    config = EpConfig(
        num_experts=problem.sizes.num_experts,
        topk=problem.sizes.topk,
        hidden=problem.sizes.hidden,
        max_tokens=problem.max_tokens,
        num_chains=1,
        dispatch_format=cast(DispatchFormat, problem.dispatch_format),
        combine_format=cast(CombineFormat, combine_format),
        recv_format=cast(RecvFormat, recv_format),
    )
    return OurBuffer(buffers.get(config), problem, mode, options.compute_us)


def peer_candidates(peers: Sequence[Peer]) -> list[Candidate]:
    """Peers have no mode, and their SMs are their own affair."""
    return [
        Candidate(peer.name, "", peer.recv_format, 0, peer.build, lambda: None) for peer in peers
    ]
