"""DecodeGraphs on CPU ranks under gradients, no_grad and inference mode, in any combination."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from layer import CONFIG, Layer, empty_inputs, random_step, require_right
from steps import Tensors

from ep_runtime import Buffer, virtual_ranks
from ep_runtime.graphs import DecodeGraphs

RANKS = 2
COUNTS = (3, 2)
Mode = Callable[[], AbstractContextManager[Any]]
MODES: list[Mode] = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    made = virtual_ranks(CONFIG, RANKS, backend="host")
    yield made
    for buffer in made:
        buffer.close()


class Model:
    """The layer between parameters, with a cache that every step writes to."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.layer = Layer(buffers)
        self.one = torch.nn.Parameter(torch.ones(CONFIG.hidden, dtype=torch.bfloat16))
        self.cache = torch.zeros(8, CONFIG.hidden, dtype=torch.bfloat16)

    def __call__(self, inputs: list[Tensors], counts: list[torch.Tensor]) -> list[Tensors]:
        scaled = [{**mine, "x": mine["x"] * self.one} for mine in inputs]
        outputs = [{"out": rank["out"] * self.one} for rank in self.layer(scaled, counts)]
        self.cache[: len(outputs[0]["out"])] = outputs[0]["out"]
        inputs[0]["x"].mul_(1)  # writing to the static inputs is the step's own business
        return outputs


def with_gradients(inputs: list[Tensors]) -> list[Tensors]:
    """The same values, as a model in training hands them on."""
    names = ("x", "weights")
    return [{**i, **{name: i[name].clone().requires_grad_() * 1 for name in names}} for i in inputs]


def group_inputs(rows: int) -> list[Tensors]:
    return [empty_inputs(rows) for _ in range(RANKS)]


@pytest.mark.parametrize("replaying", MODES)
@pytest.mark.parametrize("building", MODES)
def test_what_one_mode_built_another_replays(
    buffers: list[Buffer], building: Mode, replaying: Mode
) -> None:
    with building():
        model = Model(buffers)
        graphs = DecodeGraphs(buffers, model, group_inputs, (4, 8))
    for _ in range(2):
        inputs, wanted = random_step(COUNTS)
        with replaying():
            outputs = graphs.replay(with_gradients(inputs), COUNTS)
            require_right(outputs, wanted)
            require_right(graphs.eager(inputs, COUNTS), wanted)
            for static, mine in zip(graphs.static_inputs(4), inputs, strict=True):
                for name, tensor in mine.items():
                    static[name][: len(tensor)] = tensor
            require_right(graphs.replay(None, COUNTS), wanted)
        assert torch.equal(model.cache[:3], outputs[0]["out"])
        for rank in outputs:
            rank["out"].add_(1)  # a tensor like any other


def test_neither_inputs_nor_outputs_require_gradients(buffers: list[Buffer]) -> None:
    graphs = DecodeGraphs(buffers, Model(buffers), group_inputs, (4, 8))
    inputs, _ = random_step(COUNTS)
    kept = [graphs.replay(with_gradients(inputs), COUNTS), graphs.eager(inputs, COUNTS)]
    kept += [graphs.static_inputs(8), graphs.static_outputs(4)]
    assert not any(t.requires_grad for ranks in kept for rank in ranks for t in rank.values())


class Saved:
    """What autograd saved for a backward pass; lives as long as the history that needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


def test_a_replay_keeps_nothing_of_what_computed_its_inputs(buffers: list[Buffer]) -> None:
    histories: list[weakref.ref[Saved]] = []

    def save(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        histories.append(weakref.ref(saved))
        return saved

    graphs = DecodeGraphs(buffers, Model(buffers), group_inputs, (4, 8))
    for _ in range(3):
        inputs, _ = random_step(COUNTS)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
            graphs.replay([{**i, "x": i["x"].requires_grad_().exp()} for i in inputs], COUNTS)
    assert len(histories) == 3 * RANKS
    assert [one() for one in histories] == [None] * len(histories)


def test_inputs_that_require_gradients_may_be_static(buffers: list[Buffer]) -> None:
    def make_inputs(rows: int) -> list[Tensors]:
        return [{**i, "x": torch.nn.Parameter(i["x"])} for i in group_inputs(rows)]

    graphs = DecodeGraphs(buffers, Model(buffers), make_inputs, (4, 8))
    inputs, wanted = random_step(COUNTS)
    require_right(graphs.replay(inputs, COUNTS), wanted)
    static = graphs.static_inputs(4)[0]["x"]
    static[:3] = torch.ones(3, CONFIG.hidden, dtype=torch.bfloat16).requires_grad_()
    assert static.requires_grad  # what the caller made of this view stays with it
    require_right(graphs.replay(inputs, COUNTS), wanted)
    assert not graphs.static_inputs(4)[0]["x"].requires_grad


def test_a_replay_that_overwrites_what_backward_needs_is_noticed(buffers: list[Buffer]) -> None:
    graphs = DecodeGraphs(buffers, Model(buffers), group_inputs, (4, 8))
    inputs, _ = random_step(COUNTS)
    head = torch.ones(CONFIG.hidden, dtype=torch.bfloat16, requires_grad=True)
    loss = (graphs.replay(inputs, COUNTS)[0]["out"] * head).sum()
    graphs.replay(inputs, COUNTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
