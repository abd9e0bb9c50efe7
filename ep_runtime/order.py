"""The order between virtual ranks that share a device: every send before any receive.

A receive spins until its peers' rows arrive. Where a peer's send waits for the same GPU (or the
same thread), the receive must come after it: on a GPU through events, which a capture turns into
edges of the graph; on the host through the order of calls, which is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ep_runtime import current
from ep_runtime.errors import SequenceError

OpName = Literal["dispatch", "combine"]


class SendOrder:
    """Sends that the ranks of one process have issued, per operation and chain.

    Sends are counted, never epochs: a captured call counts once, whenever it is replayed.
    """

    def __init__(self, devices: Sequence[torch.device], num_chains: int) -> None:
        self._devices = list(devices)
        self._neighbours = [
            [peer for peer, other in enumerate(devices) if other == device] for device in devices
        ]
        self._sent = {
            (op, chain): [0] * len(devices)
            for op in get_args(OpName)
            for chain in range(num_chains)
        }
        self._masked: list[set[int]] = [set() for _ in devices]  # by whom
        # Two per rank, operation and chain: a rank is at most one send ahead of a neighbour's
        # receive.
        self._events: dict[tuple[int, OpName, int, int], torch.cuda.Event] = {}

    def alone(self, rank: int) -> bool:
        """True if no other rank uses this rank's device."""
        return len(self._neighbours[rank]) == 1

    def sent(self, rank: int, op: OpName, chain: int) -> None:
        """`rank` has just launched a send on its current stream."""
        counts = self._sent[op, chain]
        counts[rank] += 1
        device = self._devices[rank]
        if device.type == "cuda":
            self._event(rank, op, chain, counts[rank]).record(current.stream(device))

    def before_wait(self, rank: int, op: OpName, chain: int) -> None:
        """Order the receive of `rank`'s latest send after its neighbours' matching sends.

        Raises SequenceError if one of those was not issued yet.
        """
        counts = self._sent[op, chain]
        number = counts[rank]
        neighbours = self._waited_for(rank)
        for peer in neighbours:
            if counts[peer] < number:
                raise SequenceError(
                    f"rank {rank} waits on chain {chain} for its {op} {number}, but rank {peer} on"
                    f" the same device ({self._devices[rank]}) has issued {counts[peer]}: issue"
                    " every rank's dispatch() or combine() before any wait()"
                )
        device = self._devices[rank]
        if device.type == "cuda":
            stream = current.stream(device)
            for peer in neighbours:
                stream.wait_event(self._event(peer, op, chain, number))

    def set_masked(self, rank: int, peer: int, masked: bool) -> None:
        """From now on `rank` does without `peer`, or no longer does."""
        (self._masked[rank].add if masked else self._masked[rank].discard)(peer)

    def _waited_for(self, rank: int) -> list[int]:
        masked = self._masked[rank]
        if rank in masked:
            return []
        return [peer for peer in self._neighbours[rank] if peer not in masked]

    def forget(self, rank: int) -> None:
        """Start `rank` again from zero, as reset() does."""
        for counts in self._sent.values():
            counts[rank] = 0

    def _event(self, rank: int, op: OpName, chain: int, number: int) -> torch.cuda.Event:
        key = (rank, op, chain, number & 1)
        event = self._events.get(key)
        if event is None:
            event = self._events[key] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event
