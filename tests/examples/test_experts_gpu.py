"""The example layers on virtual GPU ranks, eager and captured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expert_layers import INNER, LayerGroup, config_of, layer_inputs
from support import new_rng

pytestmark = pytest.mark.gpu

RANKS = 4
FORMATS = ("batched", "contiguous", "compact")


@pytest.fixture(params=[(f, w) for f in FORMATS for w in ("fp8", "bf16")], ids="-".join)
def group(request: pytest.FixtureRequest) -> Iterator[LayerGroup]:
    made = LayerGroup(new_rng(), config_of(*request.param, RANKS), RANKS, "cuda", INNER)
    yield made
    made.close()


def test_the_layer_matches_fp64_and_never_synchronises(group: LayerGroup) -> None:
    rng = new_rng()
    assert "Triton" in group.experts[0].kernels.path
    group.layer(group.on_device(layer_inputs(rng, group.config, RANKS)))  # compiles
    for _ in range(3):
        inputs = layer_inputs(rng, group.config, RANKS)
        routed = group.on_device(inputs)
        group.poison()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outs = group.layer(routed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        group.check(inputs, outs)


def test_replays_of_two_buckets_match_fp64(group: LayerGroup) -> None:
    """The grids were fixed at capture; the rows that are there change with every replay."""
    rng = new_rng()
    group.layer(group.on_device(layer_inputs(rng, group.config, RANKS)))  # compiles
    group.check_replays(rng, turns=4)
