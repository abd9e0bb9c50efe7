"""Dispatches and combines of a chain in any order; a handle serves any number of combines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from drivers import Options
from groups import Group, Place
from support import (
    check_combined,
    check_received,
    random_config,
    random_inputs,
    random_outputs,
)

from ep_runtime import EpConfig, SequenceError, reference
from ep_runtime.reference import Expected, RankInput

OpenGroup = Callable[[EpConfig], Group]


@dataclass
class Steps:
    """Dispatches and combines of one group with fresh random inputs, each of them checked."""

    group: Group
    config: EpConfig
    rng: torch.Generator

    def draw(self) -> tuple[list[RankInput], list[Expected]]:
        inputs = random_inputs(self.rng, self.config, self.group.num_ranks, padded=True)
        return inputs, reference.dispatch(self.config, inputs)

    def dispatch(self, into: str | None = None, chain: int = 0) -> list[RankInput]:
        """A whole dispatch; into: receive tensors, opened when first named."""
        inputs, expected = self.draw()
        got = self.group.dispatch(inputs, chain, options=self.options(into))
        check_received(got, expected)
        return inputs

    def options(self, into: str | None) -> Options:
        if into is not None:
            self.group.all("open_receive_once", into)
        return Options(into=into)

    def outputs(self, inputs: list[RankInput]) -> list[torch.Tensor]:
        return random_outputs(self.rng, reference.dispatch(self.config, inputs))

    def combine(self, inputs: list[RankInput], of: str | None = None, chain: int = 0) -> None:
        """A whole combine of what `inputs` were dispatched as."""
        outputs = self.outputs(inputs)
        got = self.group.combine(outputs, chain, of=of)
        check_combined(got, self.config, inputs, outputs)

    def epochs(self, chain: int = 0) -> tuple[int, int]:
        (found,) = set(self.group.all("query", "epochs", chain))
        return found  # type: ignore[no-any-return]


@pytest.fixture
def steps(open_group: OpenGroup, place: Place, rng: torch.Generator) -> Steps:
    config = random_config(rng, place.num_ranks, 256, 4)
    return Steps(open_group(config), config, rng)


@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
def test_two_dispatches_before_their_combines(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    config = random_config(rng, place.num_ranks, 384, 3, recv_format=recv_format)
    steps = Steps(open_group(config), config, rng)
    for order in ("ab", "ba"):
        sent = {name: steps.dispatch(name) for name in "ab"}
        for name in order:
            steps.combine(sent[name], of=name)
    assert steps.epochs() == (4, 4)


def test_one_handle_is_combined_three_times(steps: Steps) -> None:
    inputs = steps.dispatch()
    for _ in range(3):
        steps.combine(inputs)  # other outputs every time
    other = steps.dispatch("other")
    steps.combine(inputs)
    steps.combine(other, of="other")
    assert steps.epochs() == (2, 5)


def test_an_older_handle_outlives_newer_dispatches(steps: Steps) -> None:
    old = steps.dispatch("old")
    for _ in range(3):
        steps.combine(steps.dispatch())
    newest = steps.dispatch()
    steps.combine(old, of="old")
    steps.combine(newest)
    steps.combine(old, of="old")


def test_receive_tensors_serve_any_chain(steps: Steps) -> None:
    """The combine goes where the dispatch was."""
    for chain in (1, 0, 1):
        inputs = steps.dispatch("apart", chain)
        steps.combine(steps.dispatch())
        steps.combine(inputs, of="apart", chain=chain)
    assert steps.epochs(1) == (2, 2)
    assert steps.epochs(0) == (4, 4)


@pytest.mark.parametrize(
    "order",
    [
        ("dispatch", "combine", "receive", "collect"),
        ("dispatch", "combine", "collect", "receive"),
        ("combine", "dispatch", "receive", "collect"),
        ("combine", "dispatch", "collect", "receive"),
    ],
    ids="-".join,
)
def test_a_dispatch_and_a_combine_are_in_flight_together(
    steps: Steps, order: tuple[str, ...]
) -> None:
    """What a model with a shared expert does: the next layer's dispatch beside this combine."""
    before, names, group = steps.dispatch("a"), "ab", steps.group
    for turn in range(1, 4):
        of, into = names[1 - turn % 2], names[turn % 2]
        following, expected = steps.draw()
        options = steps.options(into)
        outputs = steps.outputs(before)
        for part in order:
            if part == "dispatch":
                group.send(following, options=options)
            elif part == "combine":
                group.send_back(outputs, of=of)
            elif part == "receive":
                check_received(group.all("receive", 0), expected)
            else:
                check_combined(group.all("collect", 0), steps.config, before, outputs)
        before = following
    assert steps.epochs() == (4, 3)


def test_many_dispatches_without_a_combine_and_many_combines_without_a_dispatch(
    steps: Steps,
) -> None:
    """Ranks have other numbers of tokens each time, none among them: nothing holds a slot back."""
    for turn in range(7):
        last = steps.dispatch()
        assert steps.epochs() == (turn + 1, 0)
    for turn in range(7):
        steps.combine(last)
        assert steps.epochs() == (7, turn + 1)
    steps.combine(steps.dispatch())


def test_random_order(steps: Steps) -> None:
    names: list[str | None] = [None, "a", "b"]
    held: dict[str | None, list[RankInput]] = {}
    counts = [0, 0]
    for _ in range(16):
        name = names[int(torch.randint(3, (), generator=steps.rng))]
        if name in held and torch.rand((), generator=steps.rng) < 0.6:
            steps.combine(held[name], of=name)
            counts[1] += 1
        else:
            held[name] = steps.dispatch(name)
            counts[0] += 1
    assert steps.epochs() == tuple(counts)


def test_a_stale_handle_is_refused_on_every_rank(steps: Steps) -> None:
    first = steps.dispatch("a")
    steps.group.all("remember", "a", "old")
    second = steps.dispatch("a")
    outputs = steps.outputs(first)
    refused = steps.group.outcomes("combine", [(y, "old") for y in outputs])
    assert all(isinstance(one, SequenceError) and "stale" in str(one) for one in refused), refused
    steps.combine(second, of="a")  # nothing was launched


def test_a_dispatch_waits_for_the_combine_that_needs_its_tensors(steps: Steps) -> None:
    """Its routes would take the place of those that the combine adds up by."""
    inputs = steps.dispatch()
    outputs = steps.outputs(inputs)
    following, expected = steps.draw()
    steps.group.send_back(outputs)
    refused = steps.group.outcomes("dispatch", [(one, 0) for one in following])
    assert all(isinstance(one, SequenceError) and "needs" in str(one) for one in refused), refused
    check_combined(steps.group.all("collect", 0), steps.config, inputs, outputs)
    check_received(steps.group.dispatch(following), expected)
    steps.combine(following)


def test_fused_operations_come_in_any_order_too(steps: Steps) -> None:
    group = steps.group
    if not group.can_fuse:
        pytest.skip("fused operations need a device per rank")
    sent = {}
    for name in "ab":
        sent[name], expected = steps.draw()
        got = group.dispatch_fused(sent[name], options=steps.options(name))
        check_received(got, expected)
    for name in "bab":
        outputs = steps.outputs(sent[name])
        check_combined(group.combine_fused(outputs, of=name), steps.config, sent[name], outputs)
    steps.combine(sent["a"], of="a")  # split and fused mix
    steps.combine(steps.dispatch("b"), of="b")
    assert steps.epochs() == (3, 5)
