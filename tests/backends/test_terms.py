"""What ranks must do alike in an operation: who does otherwise is named, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from drivers import PLAIN, Options
from groups import Group, Place
from support import check_received, random_config, random_input, random_outputs

from ep_runtime import DesyncError, EpConfig, PeerTimeout, reference

OpenGroup = Callable[[EpConfig], Group]
BUDGET_S = 0.5
ODD = 1  # the rank that does otherwise


def told(group: Group, outcomes: list[object]) -> list[str]:
    """What the ranks that found the difference say of it. Every rank must have raised: the others
    were told, or gave up waiting."""
    checks = group.outcomes("check", [()] * group.num_ranks)
    raised = [
        one if isinstance(one, Exception) else other
        for one, other in zip(outcomes, checks, strict=True)
    ]
    assert all(isinstance(one, DesyncError | PeerTimeout) for one in raised), raised
    found = [str(one) for one in raised if "works at" in str(one)]
    assert found, raised
    return found


def odd_one_out(group: Group, odd: Options, usual: Options = PLAIN) -> list[Options]:
    return [odd if rank == ODD else usual for rank in range(group.num_ranks)]


@pytest.fixture
def config(place: Place, rng: torch.Generator) -> EpConfig:
    """Its heap has room for both formats."""
    return random_config(rng, place.num_ranks, 384, 4, dispatch_format="bf16")


@pytest.fixture
def group(open_group: OpenGroup, config: EpConfig) -> Group:
    group = open_group(config)
    group.all("query", "set_time_budget", BUDGET_S)
    group.all("open_receive", "fp8", {"dispatch_format": "fp8"})
    group.all("open_receive", "bf16", {})
    return group


def test_another_dispatch_format_is_told(
    group: Group, config: EpConfig, rng: torch.Generator
) -> None:
    inputs = [random_input(rng, config, 5) for _ in range(group.num_ranks)]
    how = odd_one_out(group, Options(into="fp8"), Options(into="bf16"))
    group.each("dispatch", [(one, 0, None, 0, o) for one, o in zip(inputs, how, strict=True)])
    outcomes = group.outcomes("receive", [(0,)] * group.num_ranks)
    for text in told(group, outcomes):
        assert "fp8 rows" in text
        assert "bf16 rows" in text


def test_another_combine_format_is_told(
    group: Group, config: EpConfig, rng: torch.Generator
) -> None:
    inputs = [random_input(rng, config, 5) for _ in range(group.num_ranks)]
    how = odd_one_out(group, Options(combine_format="fp8"))
    group.each("dispatch", [(one, 0, None, 0, o) for one, o in zip(inputs, how, strict=True)])
    expected = reference.dispatch(config, inputs)
    check_received(group.all("receive"), expected)
    group.each("combine", [(y, 0) for y in random_outputs(rng, expected)])
    for text in told(group, group.outcomes("collect", [(0,)] * group.num_ranks)):
        assert "fp8 rows" in text
        assert "bf16 rows" in text


def test_weights_that_come_elsewhere_are_told(
    group: Group, config: EpConfig, rng: torch.Generator
) -> None:
    """With the combine on one rank, with the dispatch on the others."""
    if not group.can_fuse:
        pytest.skip("weights come with the combine only where every rank has a device of its own")
    inputs = [random_input(rng, config, 5) for _ in range(group.num_ranks)]
    how = odd_one_out(group, Options(late=True))
    group.each("dispatch", [(one, 0, None, 0, o) for one, o in zip(inputs, how, strict=True)])
    group.all("receive")
    outputs = random_outputs(rng, reference.dispatch(config, inputs))
    weights = [inputs[rank].topk_weights if o.late else None for rank, o in enumerate(how)]
    calls = [(y, 0, w) for y, w in zip(outputs, weights, strict=True)]
    for text in told(group, group.outcomes("combine_fused", calls)):
        assert text.count("that bring weights") == 1


def test_handles_of_different_dispatches_are_told(
    group: Group, config: EpConfig, rng: torch.Generator
) -> None:
    """All sums would come, of rows that do not belong together."""
    inputs = [random_input(rng, config, 5) for _ in range(group.num_ranks)]
    expected = reference.dispatch(config, inputs)
    for name in ("bf16", "again"):
        group.all("open_receive_once", name)
        into = Options(into=name)
        group.each("dispatch", [(one, 0, None, 0, into) for one in inputs])
        check_received(group.all("receive"), expected)
    group.all("remember", "again", "mine")
    group.outcomes(
        "remember", [("bf16", "mine") if r == ODD else None for r in range(group.num_ranks)]
    )
    group.each("combine", [(y, "mine") for y in random_outputs(rng, expected)])
    for text in told(group, group.outcomes("collect", [(0,)] * group.num_ranks)):
        assert "of dispatch 1" in text
        assert "of dispatch 2" in text


@pytest.mark.parametrize("needs", [True, False])
def test_scales_that_lose_their_mantissas_are_told(
    group: Group, config: EpConfig, rng: torch.Generator, needs: bool
) -> None:
    """A rank that keeps exponents alone, and one whose scales have more; the other way about, all
    is well."""
    exponents = {"dispatch_format": "fp8", "scale_format": "ue8m0"}
    group.all("open_receive", "exponents", exponents)
    inputs = [random_input(rng, config, 5) for _ in range(group.num_ranks)]
    usual = Options(into="fp8", round_scale=not needs)
    how = odd_one_out(group, Options(into="exponents"), usual)
    group.each("dispatch", [(one, 0, None, 0, o) for one, o in zip(inputs, how, strict=True)])
    outcomes = group.outcomes("receive", [(0,)] * group.num_ranks)
    if not needs:
        assert not [o for o in outcomes if isinstance(o, Exception)], outcomes
        group.all("check")
        return
    # The rank that needs them says so; the others have what they need, and hear of it.
    check = group.outcomes("check", [() if r == ODD else None for r in range(group.num_ranks)])[ODD]
    error = outcomes[ODD] if isinstance(outcomes[ODD], Exception) else check
    assert isinstance(error, DesyncError), error
    assert str(error).count("fp8 rows with power-of-two scales") == 1
