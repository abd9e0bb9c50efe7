"""Random sequences of operations: chains, receive tensors, formats and ranks in any legal order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from drivers import Options
from groups import VirtualGroup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    check_combined,
    check_received,
    random_input,
    random_outputs,
)

from ep_runtime import EpConfig, SequenceError, reference
from ep_runtime.reference import Expected, RankInput

CHAINS = 3
SHARED = ("a", "b", "c")  # receive tensors that any chain may use; each chain has its own as well
OPERATIONS = 500  # dispatches and combines that a run must have checked, at least
MOVES = ("dispatch", "receive", "stale", "combine", "collect")


@dataclass
class Step:
    """One move; the ranks are called in `order`. target: name of receive tensors."""

    move: str
    chain: int
    target: str | None
    order: list[int]
    seed: int
    tokens: list[int]
    real: list[int | None]


@dataclass
class Held:
    """Receive tensors, and what the last dispatch into them was."""

    key: str | int
    into: str | None
    config: EpConfig  # with the formats of its calls
    chain: int = 0
    busy: bool = False  # a receive or a combine of it is to come
    filled: bool = False
    outdated: bool = False  # an older handle was kept
    inputs: list[RankInput] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)


class Model:
    """What the group must do, and what is in flight on it."""

    def __init__(
        self, group: VirtualGroup, config: EpConfig, formats: list[dict[str, str]]
    ) -> None:
        self.group, self.config = group, config
        self.held: dict[str | int, Held] = {
            chain: Held(chain, None, config) for chain in range(CHAINS)
        }
        for name, changes in zip(SHARED, formats, strict=True):
            group.all("open_receive", name, changes)
            self.held[name] = Held(name, name, replace(config, **changes))  # type: ignore[arg-type]
        self.receiving: dict[int, Held] = {}
        self.returning: dict[int, tuple[Held, list[torch.Tensor]]] = {}
        self.epochs = [[0, 0] for _ in range(CHAINS)]

    def make(self, step: Step) -> int:
        """The move, or the next in the list that is legal, checked; returns how many operations
        were completed.
        """
        self.group.order = step.order
        held = self.held[step.chain if step.target is None else step.target]
        start = MOVES.index(step.move)
        for move in MOVES[start:] + MOVES[:start]:
            if self._legal(move, step.chain, held):
                return self._make(move, step, held)
        return 0

    def _legal(self, move: str, chain: int, held: Held) -> bool:
        return {
            "dispatch": chain not in self.receiving and not held.busy,
            "receive": chain in self.receiving,
            "combine": held.filled and held.chain not in self.returning,
            "collect": chain in self.returning,
            "stale": held.outdated and held.chain not in self.returning,
        }[move]

    def _make(self, move: str, step: Step, held: Held) -> int:
        rng = torch.Generator().manual_seed(step.seed)
        if move == "dispatch":
            self._dispatch(held, step, rng)
        elif move == "combine":
            self._combine(held, rng)
        elif move == "stale":
            self._refused(held)
        elif move == "receive":
            return self._receive(step.chain)
        else:
            return self._collect(step.chain)
        return 0

    def finish(self) -> int:
        done = sum(self._receive(chain) for chain in list(self.receiving))
        done += sum(self._collect(chain) for chain in list(self.returning))
        for chain, (dispatched, combined) in enumerate(self.epochs):
            assert set(self.group.all("query", "epochs", chain)) == {(dispatched, combined)}
        return done

    def _dispatch(self, held: Held, step: Step, rng: torch.Generator) -> None:
        if held.filled:
            self.group.all("remember", held.key, f"old {held.key}")
            held.outdated = True
        held.inputs = [
            random_input(rng, self.config, tokens, num_tokens=real)
            for tokens, real in zip(step.tokens, step.real, strict=True)
        ]
        held.expected = reference.dispatch(held.config, held.inputs)
        self.group.send(held.inputs, step.chain, options=Options(into=held.into))
        held.chain, held.busy, held.filled = step.chain, True, False
        self.receiving[step.chain] = held

    def _receive(self, chain: int) -> int:
        held = self.receiving.pop(chain)
        check_received(self.group.all("receive", chain), held.expected)
        held.busy, held.filled = False, True
        self.epochs[chain][0] += 1
        return 1

    def _combine(self, held: Held, rng: torch.Generator) -> None:
        outputs = random_outputs(rng, held.expected, self.config.hidden)
        self.group.send_back(outputs, held.chain, of=held.into)
        held.busy = True
        self.returning[held.chain] = (held, outputs)

    def _collect(self, chain: int) -> int:
        held, outputs = self.returning.pop(chain)
        check_combined(self.group.all("collect", chain), self.config, held.inputs, outputs)
        held.busy = False
        self.epochs[chain][1] += 1
        return 1

    def _refused(self, held: Held) -> None:
        """The handle of an earlier dispatch into these tensors: nothing is launched."""
        y = torch.zeros_like(held.expected[0].x, dtype=torch.bfloat16)
        refused = self.group.outcomes("combine", [(y, f"old {held.key}")] * self.group.num_ranks)
        assert all(isinstance(one, SequenceError) for one in refused), refused
        assert all("stale" in str(one) for one in refused)


def steps(num_ranks: int, max_tokens: int) -> st.SearchStrategy[list[Step]]:
    tokens = st.integers(0, max_tokens)
    one = st.builds(
        Step,
        move=st.sampled_from(MOVES),
        chain=st.integers(0, CHAINS - 1),
        target=st.none() | st.sampled_from(SHARED),
        order=st.permutations(range(num_ranks)),
        seed=st.integers(0, 2**31),
        tokens=st.lists(tokens, min_size=num_ranks, max_size=num_ranks),
        real=st.lists(st.none() | tokens, min_size=num_ranks, max_size=num_ranks),
    )
    return st.lists(one, min_size=80, max_size=120)


PLAIN: list[dict[str, str]] = [{}, {}, {}]
FP8_TOO = [{"dispatch_format": "fp8"}, {"dispatch_format": "fp8", "scale_format": "ue8m0"}, {}]
PACKED_TOO: list[dict[str, str]] = [{"scale_format": "ue8m0"}, {}, {}]


@pytest.mark.parametrize(
    ("num_ranks", "wire", "recv_format", "formats"),
    [
        (2, "fp8", "batched", PACKED_TOO),
        (3, "bf16", "contiguous", FP8_TOO),
        (4, "opaque", "compact", PLAIN),
    ],
    ids=["fp8", "bf16-and-fp8", "opaque"],
)
def test_any_sequence_gives_the_references_results(
    num_ranks: int, wire: str, recv_format: str, formats: list[dict[str, str]]
) -> None:
    torch.set_num_threads(1)
    opaque = {"opaque_row_bytes": 80, "opaque_scale_words": 3} if wire == "opaque" else {}
    config = EpConfig(
        num_experts=3 * num_ranks,
        topk=3,
        hidden=128,
        max_tokens=6,
        num_chains=CHAINS,
        dispatch_format=wire,  # type: ignore[arg-type]
        recv_format=recv_format,  # type: ignore[arg-type]
        **opaque,
    )
    checked = 0

    @settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(steps(num_ranks, config.max_tokens))
    def run(sequence: list[Step]) -> None:
        nonlocal checked
        group = VirtualGroup(config, num_ranks, "host", None)
        model = Model(group, config, formats)
        checked += sum(model.make(step) for step in sequence) + model.finish()
        group.close()

    run()
    assert checked >= OPERATIONS, f"only {checked} operations were checked"
