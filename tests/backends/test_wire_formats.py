"""Formats of rows and scales: chosen per call, rounded, packed, strided, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

from ep_runtime import EpConfig, reference
from ep_runtime.reference import RankInput

OpenGroup = Callable[[EpConfig], Group]
FORMATS = ["batched", "contiguous", "compact"]


def check_pair(
    group: Group,
    config: EpConfig,
    rng: torch.Generator,
    options: Options,
    wire: EpConfig | None = None,
    **how: int,
) -> None:
    """A dispatch and its combine; wire: the configuration with the formats of this call."""
    called = config if wire is None else wire
    inputs = random_inputs(rng, config, group.num_ranks, padded=True)
    expected = reference.dispatch(called, inputs)
    check_received(group.dispatch(inputs, options=options, **how), expected)
    outputs = random_outputs(rng, expected, config.hidden)
    check_combined(group.combine(outputs, of=options.into), called, inputs, outputs)


@pytest.mark.parametrize("recv_format", FORMATS)
def test_fp8_and_bf16_calls_mix_on_one_chain(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    """A short message in the slot of a long one, before and after it, combined in any order."""
    config = random_config(
        rng, place.num_ranks, 384, 4, dispatch_format="bf16", recv_format=recv_format
    )
    group = open_group(config)
    small = replace(config, dispatch_format="fp8")
    group.all("open_receive", "fp8", {"dispatch_format": "fp8"})
    group.all("open_receive", "bf16", {})
    wires = {"fp8": small, "bf16": config}
    held: dict[str, list[RankInput]] = {}
    for _ in range(12):
        name = ("fp8", "bf16")[int(torch.randint(2, (), generator=rng))]
        if name in held and torch.rand((), generator=rng) < 0.5:
            outputs = random_outputs(rng, reference.dispatch(wires[name], held[name]))
            got = group.combine(outputs, of=name)
            check_combined(got, config, held[name], outputs)
            continue
        held[name] = random_inputs(rng, config, place.num_ranks, padded=True)
        got_rows = group.dispatch(held[name], options=Options(into=name))
        check_received(got_rows, reference.dispatch(wires[name], held[name]))


def test_scales_are_rounded_where_asked_for(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """The configuration says what holds where a call says nothing."""
    for default in (False, True):
        config = random_config(rng, place.num_ranks, 384, 4, round_scale=default)
        group = open_group(config)
        for asked in (None, True, False):
            rounded = default if asked is None else asked
            inputs = random_inputs(rng, config, place.num_ranks)
            got = group.dispatch(inputs, options=Options(round_scale=asked))
            expected = reference.dispatch(replace(config, round_scale=rounded), inputs)
            check_received(got, expected)
            for mine, right in zip(got, expected, strict=True):
                assert mine.scales is not None
                mantissa = torch.frexp(mine.scales[right.valid]).mantissa
                if rounded:
                    assert (mantissa == 0.5).all()
                elif len(mantissa):
                    assert (mantissa != 0.5).any()


@pytest.mark.parametrize("recv_format", FORMATS)
@pytest.mark.parametrize("hidden", [128, 512, 640, 896])
def test_packed_exponents(
    open_group: OpenGroup, place: Place, rng: torch.Generator, hidden: int, recv_format: str
) -> None:
    """UE8M0, four to a word, by rows and by columns; 1, 4, 5 and 7 groups."""
    config = random_config(
        rng, place.num_ranks, hidden, 3, recv_format=recv_format, scale_format="ue8m0"
    )
    group = open_group(config)
    group.all("open_receive", "columns", {"column_major_scales": True})
    for into in (None, "columns"):
        check_pair(group, config, rng, Options(into=into))


def test_one_configuration_receives_both_kinds_of_scales(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(rng, place.num_ranks, 640, 3)
    group = open_group(config)
    group.all("open_receive", "packed", {"scale_format": "ue8m0"})
    packed = replace(config, scale_format="ue8m0")
    for _ in range(2):
        check_pair(group, config, rng, Options())
        check_pair(group, config, rng, Options(into="packed"), packed)


@pytest.mark.parametrize("recv_format", FORMATS)
def test_column_major_scales_have_stride_one_over_rows(
    open_group: OpenGroup, place: Place, rng: torch.Generator, recv_format: str
) -> None:
    config = random_config(rng, place.num_ranks, 384, 4, recv_format=recv_format)
    group = open_group(config)
    rows, experts = config.recv_rows(place.num_ranks), config.local_experts(place.num_ranks)
    batched = recv_format == "batched"
    lead = (experts,) if batched else ()
    for made in group.all("open_receive", "columns", {"column_major_scales": True}):
        assert made == ((*lead, rows, 3), (*((3 * rows,) if batched else ()), 1, rows))
    for _ in range(2):
        check_pair(group, config, rng, Options(into="columns"))


@pytest.mark.parametrize("recv_format", FORMATS)
@pytest.mark.parametrize(
    ("row_bytes", "words"), [(16, 0), (48, 1), (528, 33), (4112, 7), (14336, 56)]
)
def test_opaque_rows_travel_as_they_are(
    open_group: OpenGroup,
    place: Place,
    rng: torch.Generator,
    row_bytes: int,
    words: int,
    recv_format: str,
) -> None:
    config = random_config(
        rng,
        place.num_ranks,
        256,
        4,
        max_tokens=10,
        dispatch_format="opaque",
        opaque_row_bytes=row_bytes,
        opaque_scale_words=words,
        recv_format=recv_format,
    )
    group = open_group(config)
    group.all("open_receive", "columns", {"column_major_scales": True})
    check_pair(group, config, rng, Options(scale_order="columns"))
    check_pair(group, config, rng, Options(scale_order="gaps"), extra_stride=32)
    check_pair(group, config, rng, Options(into="columns"))


def test_opaque_rows_may_have_any_dtype(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    config = random_config(
        rng,
        place.num_ranks,
        256,
        4,
        dispatch_format="opaque",
        opaque_row_bytes=256,
        opaque_scale_words=2,
    )
    group = open_group(config)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.float64):
        inputs = [
            replace(one, x=one.x.view(dtype), scales=one.scales.view(torch.float32))  # type: ignore[union-attr]
            for one in random_inputs(rng, config, place.num_ranks)
        ]
        check_received(group.dispatch(inputs), reference.dispatch(config, inputs))
