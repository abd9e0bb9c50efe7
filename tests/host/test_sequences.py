"""Random sequences of operations: chains, ranks and steps in any order that the rules allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from groups import VirtualGroup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    check_combined,
    check_received,
    random_input,
    random_outputs,
)

from ep_runtime import EpConfig, reference
from ep_runtime.reference import Expected, RankInput

CHAINS = 3
OPERATIONS = 500  # dispatches and combines that a run must have checked, at least

Advance = Callable[[VirtualGroup, EpConfig], None]


@dataclass
class Step:
    """One move: a chain takes its next phase, the ranks are called in `order`."""

    chain: int
    order: list[int]
    seed: int
    tokens: list[int]
    real: list[int | None]


@dataclass
class Chain:
    """What is in flight on one chain, and what it must become."""

    number: int
    phase: int = 0
    inputs: list[RankInput] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)

    def advance(self, group: VirtualGroup, config: EpConfig, step: Step) -> int:
        """The chain's next phase; returns how many operations were completed and checked."""
        rng = torch.Generator().manual_seed(step.seed)
        group.order = step.order
        phase, self.phase = self.phase, (self.phase + 1) % 4
        if phase == 0:
            self.inputs = [
                random_input(rng, config, tokens, num_tokens=real)
                for tokens, real in zip(step.tokens, step.real, strict=True)
            ]
            self.expected = reference.dispatch(config, self.inputs)
            group.each("dispatch", [(one, self.number) for one in self.inputs])
        elif phase == 1:
            check_received(group.all("receive", self.number), self.expected)
        elif phase == 2:
            self.outputs = random_outputs(rng, self.expected)
            group.each("combine", [(y, self.number) for y in self.outputs])
        else:
            got = group.all("collect", self.number)
            check_combined(got, config, self.inputs, self.outputs)
        return phase % 2


def steps(num_ranks: int, max_tokens: int) -> st.SearchStrategy[list[Step]]:
    tokens = st.integers(0, max_tokens)
    one = st.builds(
        Step,
        chain=st.integers(0, CHAINS - 1),
        order=st.permutations(range(num_ranks)),
        seed=st.integers(0, 2**31),
        tokens=st.lists(tokens, min_size=num_ranks, max_size=num_ranks),
        real=st.lists(st.none() | tokens, min_size=num_ranks, max_size=num_ranks),
    )
    return st.lists(one, min_size=60, max_size=100)


@pytest.mark.parametrize(
    ("num_ranks", "wire", "recv_format"),
    [(2, "fp8", "batched"), (3, "bf16", "contiguous"), (4, "fp8", "compact")],
)
def test_any_sequence_gives_the_references_results(
    num_ranks: int, wire: str, recv_format: str
) -> None:
    torch.set_num_threads(1)
    config = EpConfig(
        num_experts=3 * num_ranks,
        topk=3,
        hidden=128,
        max_tokens=6,
        num_chains=CHAINS,
        dispatch_format=wire,  # type: ignore[arg-type]
        recv_format=recv_format,  # type: ignore[arg-type]
    )
    checked = 0

    @settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(steps(num_ranks, config.max_tokens))
    def run(sequence: list[Step]) -> None:
        nonlocal checked
        group = VirtualGroup(config, num_ranks, "host", None)
        chains = [Chain(number) for number in range(CHAINS)]
        for step in sequence:
            checked += chains[step.chain].advance(group, config, step)
        group.close()

    run()
    assert checked >= OPERATIONS, f"only {checked} operations were checked"
