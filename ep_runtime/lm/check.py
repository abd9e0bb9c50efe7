"""Every decoded token against the single-rank reference, and sampling that both can repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.lm.checkpoint import Checkpoint
from ep_runtime.lm.config import VOCAB

# Largest difference of a logit from the reference that counts as rounding, by format on the wire.
TOLERANCE = {"bf16": 0.25, "fp8": 1.0}


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: greedy. Otherwise Gumbel noise that depends on seed, prompt and position only,
    so any number of ranks draws the same."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature={self.temperature} must be finite and at least 0: 0 is greedy"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")

    def scores(self, logits: Tensor, prompt_index: int, position: int) -> Tensor:
        """[256] on the CPU: the token with the highest score is chosen."""
        if self.temperature == 0:
            return logits
        generator = np.random.default_rng((self.seed, prompt_index, position))
        noise = torch.from_numpy(generator.gumbel(size=VOCAB).astype(np.float32))
        return logits / self.temperature + noise


GREEDY = Sampling()


class Decoded(Protocol):
    """What the check needs of a sequence: see lm.decode.DecodedSequence."""

    @property
    def index(self) -> int: ...
    @property
    def prompt(self) -> bytes: ...
    @property
    def generated(self) -> bytes: ...
    @property
    def logits(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that the reference would not have chosen.

    Logits are pairs: of the token that was decoded, and of the one the reference prefers.
    own_choice: the token is what the decoded logits say.
    """

    prompt_index: int
    position: int
    tokens: tuple[int, int]
    logits: tuple[float, float]
    reference: tuple[float, float]
    own_choice: bool

    @property
    def error(self) -> float:
        """The larger of the two logits' deviations from the reference."""
        return max(abs(a - b) for a, b in zip(self.logits, self.reference, strict=True))

    def is_tie(self, tolerance: float) -> bool:
        """Rounding explains it."""
        return self.own_choice and self.error <= tolerance

    def __str__(self) -> str:
        mine, theirs = (repr(chr(token)) for token in self.tokens)
        return (
            f"prompt {self.prompt_index} position {self.position}: decoded {mine}, reference "
            f"{theirs}; logits {self.logits[0]:.4f} and {self.logits[1]:.4f}, reference "
            f"{self.reference[0]:.4f} and {self.reference[1]:.4f}"
        )


@dataclass(frozen=True, slots=True)
class CheckReport:
    """compared tokens: equal to the reference's, ties (chosen from logits that lie within
    `tolerance` of the reference's), or mismatches. max_error: of all logits of all tokens."""

    compared: int
    ties: tuple[Difference, ...]
    mismatches: tuple[Difference, ...]
    max_error: float
    tolerance: float

    @property
    def equal(self) -> int:
        return self.compared - len(self.ties) - len(self.mismatches)

    @property
    def ok(self) -> bool:
        return self.compared > 0 and not self.mismatches

    def __str__(self) -> str:
        head = (
            f"{self.equal} of {self.compared} tokens equal the reference's, {len(self.ties)} ties "
            f"in rounding, {len(self.mismatches)} mismatches (largest logit error "
            f"{self.max_error:.4f}; up to {self.tolerance:g} a differing token counts as a tie)"
        )
        ties = [f"  tie: {difference}" for difference in self.ties]
        wrong = [f"  mismatch: {difference}" for difference in self.mismatches]
        return "\n".join([head, *ties, *wrong])


def merge_checks(reports: Sequence[CheckReport]) -> CheckReport:
    """One report for the reports of all ranks."""
    return CheckReport(
        sum(report.compared for report in reports),
        tuple(tie for report in reports for tie in report.ties),
        tuple(wrong for report in reports for wrong in report.mismatches),
        max((report.max_error for report in reports), default=0.0),
        max((report.tolerance for report in reports), default=0.0),
    )


def check_against_reference(
    checkpoint: Checkpoint,
    sequences: Sequence[Decoded],
    sampling: Sampling,
    tolerance: float,
    device: str | torch.device = "cpu",
) -> CheckReport:
    """Compare every generated token with what the float32 reference chooses after the same bytes.

    Each token is judged after the bytes that were decoded before it, so one tie does not make the
    rest of the text differ. A differing token is a tie if it is what the decoded logits say, and
    its logit and that of the reference's choice both lie within `tolerance` of the reference's;
    else a mismatch. So is a token whose logits, here or there, are not finite. Raises ShapeError
    for sequences without logits.
    """
    model = checkpoint.reference(device)
    compared, max_error = 0, 0.0
    ties: list[Difference] = []
    mismatches: list[Difference] = []
    for sequence in sequences:
        if sequence.logits is None:
            raise ShapeError(
                f"prompt {sequence.index} has no logits; decode with keep_logits=True to check"
            )
        fed = (sequence.prompt + sequence.generated)[:-1]
        with torch.no_grad():
            output, _ = model(torch.tensor([list(fed)], device=device))
        first = len(sequence.prompt) - 1
        reference = output[0, first:].cpu()
        mine = sequence.logits.float().cpu()
        error = (mine - reference).abs().max().item()
        max_error = max(max_error, error if math.isfinite(error) else math.inf)
        finite = (mine.isfinite() & reference.isfinite()).all(dim=1).tolist()
        for offset, token in enumerate(sequence.generated):
            position = first + offset
            scores = sampling.scores(reference[offset], sequence.index, position)
            best = int(scores.argmax())
            compared += 1
            if token == best and finite[offset]:
                continue
            own = sampling.scores(mine[offset], sequence.index, position)
            pair = [token, best]
            difference = Difference(
                sequence.index,
                position,
                (token, best),
                tuple(mine[offset, pair].tolist()),
                tuple(reference[offset, pair].tolist()),
                finite[offset] and bool(own[token] == own.max()),
            )
            (ties if difference.is_tie(tolerance) else mismatches).append(difference)
    return CheckReport(compared, tuple(ties), tuple(mismatches), max_error, tolerance)
