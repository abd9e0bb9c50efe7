"""A model that runs under another default dtype gets the same bits: nothing of ours follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import programs
import pytest
import torch
from expect import check_received, random_results, random_tokens
from ranks import ThreadGroup

from ep_runtime.normal import reference
from ep_runtime.normal.reference import RankTokens

RANKS, EXPERTS, TOPK, HIDDEN = 4, 8, 4, 256
SIZES = {"max_tokens": 16, "max_hidden": HIDDEN, "max_experts": EXPERTS, "max_topk": TOPK}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For all threads of this process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("between", [None, "flat", "direct", "puts"])
def test_summed_weights_are_float32_under_any_default(
    rng: torch.Generator, between: str | None
) -> None:
    """The native sum writes four bytes a weight, whatever torch would make of torch.empty()."""
    nodes: dict[str, Any] = {}
    if between is not None:
        nodes = {"ranks_per_node": 2, "between_nodes": between}
    group = ThreadGroup(RANKS, "host", None, **SIZES, **nodes)
    inputs = [random_tokens(rng, 12, HIDDEN, TOPK, EXPERTS) for _ in range(RANKS)]
    options = {"num_experts": EXPERTS}

    def both(give: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> list[Any]:
        if give is None:
            return group.run(programs.dispatch_with, [(one, options) for one in inputs])
        return group.run(programs.combine, [(y, w, []) for y, w in give])

    expected = check_received(both(), inputs, EXPERTS)
    rows, weights = random_results(rng, expected, HIDDEN, TOPK)
    given = list(zip(rows, weights, strict=True))
    right = both(given)
    with default_dtype(torch.bfloat16):
        received = both()
        got = both(given)
    check_received(received, inputs, EXPERTS)
    for (y, w), (right_y, right_w) in zip(got, right, strict=True):
        assert w.dtype is torch.float32
        assert torch.equal(w, right_w)
        assert torch.equal(y, right_y)
    group.close()


def test_the_reference_does_not_follow_the_default(rng: torch.Generator) -> None:
    inputs: list[RankTokens] = [random_tokens(rng, 9, HIDDEN, TOPK, EXPERTS) for _ in range(RANKS)]
    right = reference.dispatch(inputs, EXPERTS)
    with default_dtype(torch.bfloat16):
        got = reference.dispatch(inputs, EXPERTS)
    for mine, other in zip(got, right, strict=True):
        assert mine.topk_weights.dtype is torch.float32
        assert torch.equal(mine.topk_weights, other.topk_weights)
