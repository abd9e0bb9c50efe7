"""Inputs of the benchmark: repeatable everywhere, and as skewed as they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ep_runtime.bench.routing import Sizes, make_inputs, make_routes

UNIFORM = Sizes(
    num_ranks=4, num_tokens=300, hidden=256, topk=4, num_experts=16, skew="uniform", seed=7
)
SKEWS = ("uniform", "zipf", "one-rank", "half-empty")


@pytest.mark.parametrize("skew", SKEWS)
def test_the_same_seed_gives_the_same_inputs_and_another_seed_others(skew: str) -> None:
    sizes = replace(UNIFORM, skew=skew)  # type: ignore[arg-type]
    one, again = make_inputs(sizes, 1, 2), make_inputs(sizes, 1, 2)
    other = make_inputs(replace(sizes, seed=8), 1, 2)
    for name in ("x", "topk_idx", "topk_weights"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_ranks_and_sets_differ() -> None:
    seen = {
        tuple(make_routes(UNIFORM, rank, index)[0].flatten().tolist())
        for rank in range(3)
        for index in range(3)
    }
    assert len(seen) == 9


@pytest.mark.parametrize("skew", SKEWS)
def test_experts_of_a_token_are_distinct_and_in_range(skew: str) -> None:
    idx, _ = make_routes(replace(UNIFORM, skew=skew), 0, 0)  # type: ignore[arg-type]
    assert idx.shape == (300, 4)
    assert idx.min() >= 0
    assert idx.max() < 16
    assert all(len(set(row)) == 4 for row in idx.tolist())


@pytest.mark.parametrize("skew", SKEWS)
def test_weights_of_a_token_are_positive_and_sum_to_one(skew: str) -> None:
    _, weights = make_routes(replace(UNIFORM, skew=skew), 0, 0)  # type: ignore[arg-type]
    assert weights.dtype == torch.float32
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(300))


def loads(skew: str) -> torch.Tensor:
    sizes = replace(UNIFORM, skew=skew, num_tokens=2000)  # type: ignore[arg-type]
    return torch.bincount(make_routes(sizes, 0, 0)[0].flatten(), minlength=16).double()


def test_uniform_loads_every_expert_alike() -> None:
    mean = 2000 * 4 / 16
    assert (loads("uniform") - mean).abs().max() < 5 * mean**0.5


def test_zipf_loads_a_few_experts_most() -> None:
    load = loads("zipf").sort(descending=True).values
    assert load[0] > 3 * load[-1]
    assert load[:4].sum() > 0.45 * load.sum()


def test_zipf_prefers_the_same_experts_on_every_rank_and_set() -> None:
    sizes = replace(UNIFORM, skew="zipf", num_tokens=2000)
    favourites = {
        int(torch.bincount(make_routes(sizes, rank, index)[0].flatten()).argmax())
        for rank in range(4)
        for index in range(2)
    }
    assert len(favourites) == 1


def test_one_rank_gets_everything() -> None:
    idx, _ = make_routes(replace(UNIFORM, skew="one-rank"), 3, 0)
    assert idx.max() < 16 // 4


def test_one_rank_with_fewer_experts_than_choices_leaves_the_rest_empty() -> None:
    idx, _ = make_routes(replace(UNIFORM, skew="one-rank", num_experts=8), 0, 0)
    assert all(sorted(row) == [-1, -1, 0, 1] for row in idx.tolist())


def test_half_of_the_ranks_are_empty() -> None:
    sizes = replace(UNIFORM, skew="half-empty")
    assert [sizes.tokens_of(rank) for rank in range(4)] == [300, 300, 0, 0]
    assert make_inputs(sizes, 3, 0).x.shape == (0, 256)
    assert make_inputs(sizes, 3, 0).topk_idx.shape == (0, 4)


def test_one_rank_alone_is_never_empty() -> None:
    assert replace(UNIFORM, skew="half-empty", num_ranks=1).tokens_of(0) == 300
