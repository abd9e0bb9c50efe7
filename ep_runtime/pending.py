"""A receive that was not launched yet: the hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ep_runtime.errors import SequenceError
from ep_runtime.handles import Uses
from ep_runtime.order import OpName

T = TypeVar("T")


class Pending(Generic[T]):
    """The second half of a dispatch or combine. Nothing runs for it until `wait()`.

    Put work between the two: no SM (and no thread) is occupied meanwhile. Capturable.
    """

    __slots__ = ("_finish", "chain", "op", "uses")

    def __init__(
        self, op: OpName, chain: int, uses: Uses, finish: Callable[[Pending[T]], T]
    ) -> None:
        """uses: of the receive tensors (and their routing) that the receive needs."""
        self.op: OpName = op
        self.chain = chain
        self.uses = uses
        self._finish: Callable[[Pending[T]], T] | None = finish

    @property
    def waited(self) -> bool:
        """True once `wait()` has launched the receive."""
        return self._finish is None

    def wait(self) -> T:
        """Launch the receive on the current stream (host: receive now) and return its result.

        Raises SequenceError if it was called before, or, on virtual ranks, while a rank that
        shares this device has not issued its half yet (then nothing was launched: call again).
        """
        finish = self._finish
        if finish is None:
            raise SequenceError(
                f"wait() was called before on this {self.op} of chain {self.chain}; call it once"
                " and keep what it returns"
            )
        return finish(self)

    def close(self) -> None:
        """Mark as waited for."""
        self._finish = None

    def __repr__(self) -> str:
        state = "received" if self.waited else "sent"
        return f"Pending({self.op}, chain={self.chain}, {state})"
