"""Which sequence is in which row of a rank's batch: continuous batching in plain Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from ep_runtime.errors import ShapeError


@dataclass(slots=True)
class Sequence:
    """One prompt and what was decoded after it. `position` is the next one to feed."""

    index: int
    prompt: bytes
    num_tokens: int
    generated: bytearray = field(default_factory=bytearray)
    logits: list[Tensor] = field(default_factory=list)
    position: int = 0

    @property
    def token(self) -> int:
        """The byte at `position`."""
        past_prompt = self.position - len(self.prompt)
        return self.prompt[self.position] if past_prompt < 0 else self.generated[past_prompt]

    @property
    def generating(self) -> bool:
        """True if this step's output is kept, and not replaced by a byte of the prompt."""
        return self.position >= len(self.prompt) - 1

    @property
    def done(self) -> bool:
        return len(self.generated) == self.num_tokens

    def advance(self, output: int) -> None:
        if self.generating:
            self.generated.append(output)
        self.position += 1


class Batch:
    """One rank's rows: the first `len(rows)` are in use, the rest of the bucket is padding."""

    def __init__(self, sequences: Seq[Sequence], size: int) -> None:
        self.all_sequences = tuple(sequences)
        self._waiting = deque(sequences)
        self.rows = [self._waiting.popleft() for _ in range(min(size, len(sequences)))]

    def retire(self) -> list[tuple[int, int]]:
        """Let waiting sequences take the rows of finished ones, and close gaps with the last row.

        Returns the moves (source row, target row) that the cache must follow, in order.
        """
        moves = []
        for row in reversed(range(len(self.rows))):
            if not self.rows[row].done:
                continue
            if self._waiting:
                self.rows[row] = self._waiting.popleft()
                continue
            last = self.rows.pop()
            if row < len(self.rows):
                self.rows[row] = last
                moves.append((len(self.rows), row))
        return moves


def assign(prompts: Seq[bytes], num_tokens: int, rank: int, num_ranks: int) -> list[Sequence]:
    """The sequences of one rank: prompt i goes to rank i modulo the number of ranks.

    An empty prompt becomes a line break: every work of the corpus starts its paragraphs after one.
    """
    return [
        Sequence(index, prompt or b"\n", num_tokens)
        for index, prompt in enumerate(prompts)
        if index % num_ranks == rank
    ]


def count_steps(prompts: Seq[bytes], num_tokens: int, num_ranks: int, size: int) -> int:
    """Steps until every rank is done: the number that all ranks must run, idle or not."""
    most = 0
    for rank in range(num_ranks):
        batch = Batch(assign(prompts, num_tokens, rank, num_ranks), size)
        steps = 0
        while batch.rows:
            for sequence in batch.rows:
                sequence.advance(0)
            batch.retire()
            steps += 1
        most = max(most, steps)
    return most


def check_lengths(prompts: Seq[bytes], num_tokens: int, max_context: int) -> None:
    """Raise ShapeError unless every prompt and its continuation fit into the context."""
    if num_tokens < 1:
        raise ShapeError(f"tokens is {num_tokens}; decode at least 1")
    if not prompts:
        raise ShapeError("no prompts were given; give at least one (it may be empty)")
    for index, prompt in enumerate(prompts):
        positions = max(len(prompt), 1) + num_tokens - 1
        if positions > max_context:
            raise ShapeError(
                f"prompt {index} has {len(prompt)} bytes, with {num_tokens} tokens that is "
                f"{positions} positions, and the model has {max_context}; shorten the prompt or "
                f"decode at most {max(max_context - len(prompt) + 1, 0)} tokens"
            )
