"""Which call of a Buffer may follow which: refused before anything is launched."""

from __future__ import annotations

from typing import NoReturn

import torch

from ep_runtime.errors import SequenceError
from ep_runtime.handles import Received
from ep_runtime.order import OpName
from ep_runtime.pending import Pending
from ep_runtime.rank import OpKind, OpRecord, Rank
from ep_runtime.receive import ReceiveBuffer


class CallOrder(Rank):
    """A rank that knows what was sent and not received, and who shares its device."""

    def _check_before_dispatch(self) -> None:
        """What the device recorded; of bad routes only where that ends nothing: a rank that stops
        between its operations keeps those waiting that have begun them too."""
        if self._open:
            self._check_fatal()
        else:
            self.check()

    def _claim(self, op: str, kind: OpName, chain: int) -> None:
        """Raise unless the chain's last receive of this kind was waited for."""
        if (kind, chain) in self._open:
            raise SequenceError(
                f"{op} on chain {chain}: its last {kind} was not waited for; call wait() on what"
                " it returned, use another chain, or reset() on every rank to drop it"
            )

    def _require_free(self, op: str, chain: int, into: ReceiveBuffer) -> None:
        """Raise if a receive that is still to come needs what `into` holds."""
        uses = into.received.handle.uses
        for pending in list(self._open.values()):  # other threads have chains of their own
            if pending.uses is uses:
                raise SequenceError(
                    f"{op} on chain {chain}: a {pending.op} on chain {pending.chain} that was not"
                    " waited for still needs these receive tensors; call its wait() first, or give"
                    " this dispatch others with out=buffer.new_receive()"
                )

    def _tell(self, kind: OpKind, chain: int) -> None:
        """Let the recorder of a capture know what is launched next."""
        if self.recorder is not None:
            self.recorder(OpRecord(chain, kind))

    def _before_wait(
        self, kind: OpKind, pending: Pending[Received] | Pending[torch.Tensor]
    ) -> None:
        self._require_open()
        if self._order is not None:
            self._order.before_wait(self.rank, pending.op, pending.chain)
        self._tell(kind, pending.chain)
        pending.close()
        self._open.pop((pending.op, pending.chain), None)

    def _after_host_wait(self) -> None:
        """A host receive has already failed or not when it returns: say so now."""
        if self._on_host:
            self._check_fatal()

    def _only_alone(self, op: str, split: str) -> None:
        order = self._order
        if order is not None and not order.alone(self.rank):
            self._refuse_fused(op, split)

    def _refuse_late_weights(self, op: str) -> None:
        """A combine that brings weights waits for them before it sends."""
        order = self._order
        if order is not None and not order.alone(self.rank):
            raise SequenceError(
                f"{op} without topk_weights on virtual rank {self.rank}, which shares"
                f" {self.device} with other ranks: its combine would wait for weights that keep"
                " others from sending; give topk_weights to the dispatch, or use processes"
            )

    def _refuse_fused(self, op: str, split: str) -> NoReturn:
        raise SequenceError(
            f"{op} on virtual rank {self.rank}, which shares {self.device} with other ranks: its"
            f" receive would keep their sends from starting; call {split}() on every rank, then"
            " wait() on every result"
        )
