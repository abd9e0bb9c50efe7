"""What a load takes and what it refuses, before it changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ep_runtime import ShapeError
from ep_runtime.graphs.staging import StaticInputs

CAPACITY = 6
Tensors = dict[str, torch.Tensor]


def values() -> Tensors:
    grid = torch.arange(CAPACITY * CAPACITY, dtype=torch.float32)
    return {
        "x": grid.view(CAPACITY, CAPACITY).clone(),
        "y": grid.view(CAPACITY, CAPACITY) + 100,
        "scale": torch.tensor(3.0),
    }


@pytest.fixture
def static() -> StaticInputs:
    return StaticInputs(values(), CAPACITY, torch.device("cpu"))


def load(static: StaticInputs, change: dict[str, Any], num_tokens: int) -> None:
    inputs = {name: tensor.clone() for name, tensor in static.views(CAPACITY).items()} | change
    static.check(inputs, num_tokens)
    static.load(inputs, num_tokens)


def require_unchanged(static: StaticInputs) -> None:
    for name, wanted in values().items():
        assert torch.equal(static.views(CAPACITY)[name], wanted)
    assert static.num_tokens == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0] * CAPACITY] * CAPACITY, "'x' is a list; give a dense tensor"),
        (None, "'x' is a NoneType"),
        (torch.zeros(CAPACITY, CAPACITY).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(CAPACITY, CAPACITY, device="meta"), "on meta"),
    ],
)
def test_what_holds_no_values_is_refused(static: StaticInputs, given: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        load(static, {"x": given}, 2)
    require_unchanged(static)


def test_inputs_without_names_are_refused(static: StaticInputs) -> None:
    given: Any = torch.zeros(CAPACITY, CAPACITY)
    with pytest.raises(ShapeError, match="inputs is a Tensor; give a dict of tensors by name"):
        static.check(given, 2)


@pytest.mark.parametrize(
    ("view", "num_tokens"),
    [
        (lambda s: s["x"][1:], 3),
        (lambda s: s["x"].t(), 2),
        (lambda s: s["x"][:1].expand(3, CAPACITY), 3),
        (lambda s: s["x"].flatten()[1 : 1 + 2 * CAPACITY].view(2, CAPACITY), 2),
    ],
)
def test_memory_that_its_own_copy_changes_is_refused(
    static: StaticInputs, view: Callable[[Tensors], torch.Tensor], num_tokens: int
) -> None:
    with pytest.raises(ShapeError, match=r"'x' is in the memory of static input 'x'.*clone\(\)"):
        load(static, {"x": view(static.views(CAPACITY))}, num_tokens)
    require_unchanged(static)


def test_memory_that_an_earlier_copy_changes_is_refused(static: StaticInputs) -> None:
    mine = static.views(CAPACITY)
    with pytest.raises(ShapeError, match="'y' is in the memory of static input 'x'"):
        load(static, {"x": mine["y"], "y": mine["x"]}, 3)
    require_unchanged(static)


@pytest.mark.parametrize(
    ("change", "num_tokens"),
    [
        (lambda s: s, CAPACITY),  # where it belongs already
        (lambda s: {"x": s["x"][:4]}, 4),
        (lambda s: {"x": s["x"][3:]}, 3),  # read behind what is written
        (lambda s: {"y": s["x"]}, CAPACITY),  # x stays as it is
        (lambda s: {"x": s["x"][1:]}, 0),
        (lambda s: {"x": torch.ones_like(s["x"][:1, :1]).expand(CAPACITY, CAPACITY)}, 5),
        (lambda s: {"scale": s["x"][0, 1]}, 1),
    ],
)
def test_memory_that_no_copy_changes_is_loaded(
    static: StaticInputs, change: Callable[[Tensors], Tensors], num_tokens: int
) -> None:
    given = change(static.views(CAPACITY)) | {}
    if "x" not in given:
        given["x"] = static.views(CAPACITY)["x"]
    wanted = {name: tensor.clone() for name, tensor in given.items()}
    load(static, given, num_tokens)
    for name, tensor in wanted.items():
        rows = slice(num_tokens) if tensor.dim() else ...
        assert torch.equal(static.views(CAPACITY)[name][rows], tensor[rows])
    assert static.num_tokens == num_tokens
