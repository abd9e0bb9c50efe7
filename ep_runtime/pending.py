"""A receive that was not launched yet: the hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from ep_runtime.errors import SequenceError
from ep_runtime.handles import Uses
from ep_runtime.order import OpName

T = TypeVar("T")


class Pending(Generic[T]):
    """The second half of a dispatch or combine. Nothing runs for it until `wait()`.

    Put work between the two: no SM (and no thread) is occupied meanwhile. Capturable.
    """

    __slots__ = ("_dropped", "_finish", "chain", "op", "uses")

    def __init__(
        self, op: OpName, chain: int, uses: Uses, finish: Callable[[Pending[T]], T]
    ) -> None:
        """uses: of the receive tensors (and their routing) that the receive needs."""
        self.op: OpName = op
        self.chain = chain
        self.uses = uses
        self._finish: Callable[[Pending[T]], T] | None = finish
        self._dropped = False

    @property
    def waited(self) -> bool:
        """True once `wait()` has launched the receive."""
        return self._finish is None and not self._dropped

    def wait(self) -> T:
        """Launch the receive on the current stream (host: receive now) and return its result.

        On a GPU the caller sees to it that the receive comes behind its send, and the chain's next
        send behind the receive: calls on one stream do, those on several take events.

        Raises SequenceError if it was called before, if reset() has dropped what was sent, or, on
        virtual ranks, while a rank that shares this device has not issued its half yet (then
        nothing was launched: call again). On the host also whatever Buffer.check() raises.
        """
        finish = self._finish
        if self._dropped:
            raise SequenceError(
                f"wait() on a {self.op} of chain {self.chain} that was dropped by reset(): nothing"
                " of it will arrive; send again on every rank, and wait() on what that returns"
            )
        if finish is None:
            raise SequenceError(
                f"wait() was called before on this {self.op} of chain {self.chain}; call it once"
                " and keep what it returns"
            )
        return finish(self)

    def close(self) -> None:
        """Mark as waited for."""
        self._finish = None

    def drop(self) -> None:
        """Mark as never to be waited for: reset() forgot what was sent."""
        self._finish = None
        self._dropped = True

    if not TYPE_CHECKING:  # which knows the attributes

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"a Pending has no {name!r}: call wait() on it, and use what that returns"
            )

    def __repr__(self) -> str:
        state = "dropped" if self._dropped else "received" if self.waited else "sent"
        return f"Pending({self.op}, chain={self.chain}, {state})"
