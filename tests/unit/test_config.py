"""EpConfig refuses what no group can use, and says what would be right."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from ep_runtime import ConfigError, EpConfig
from ep_runtime.layout import layout_of

GOOD = EpConfig(num_experts=16, topk=4, hidden=256, max_tokens=32)


@pytest.mark.parametrize(
    ("change", "value_and_limit"),
    [
        ({"num_experts": 0}, "num_experts=0.*1 to 1024"),
        ({"num_experts": 1025}, "num_experts=1025.*1 to 1024"),
        ({"topk": 33}, "topk=33.*1 to 32"),
        ({"topk": 2.0}, r"topk=2\.0.*integer"),
        ({"topk": True}, "topk=True.*integer"),
        ({"hidden": 64}, "hidden=64.*128 to 16384"),
        ({"hidden": 16512}, "hidden=16512.*128 to 16384"),
        ({"hidden": 200}, "hidden=200.*multiple of 128.*256"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"num_chains": 0}, "num_chains=0"),
        ({"num_chains": 9}, "num_chains=9.*1 to 8"),
        ({"dispatch_format": "fp4"}, "dispatch_format='fp4'.*bf16, fp8, opaque"),
        ({"scale_format": "e8m0"}, "scale_format='e8m0'.*float32, ue8m0"),
        ({"opaque_row_bytes": 64}, "opaque_row_bytes=64 with dispatch_format='fp8'.*opaque"),
        ({"opaque_scale_words": 2}, "opaque_scale_words=2 with dispatch_format='fp8'"),
        ({"recv_format": "packed"}, "recv_format='packed'.*batched, contiguous, compact"),
        ({"alignment": 0, "recv_format": "contiguous"}, "alignment=0"),
        ({"alignment": 16}, "alignment=16.*contiguous"),
    ],
)
def test_bad_value_is_named_with_its_limit(change: dict[str, Any], value_and_limit: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(value_and_limit, re.DOTALL)):
        replace(GOOD, **change)


OPAQUE = replace(GOOD, dispatch_format="opaque", opaque_row_bytes=144, opaque_scale_words=5)


@pytest.mark.parametrize(
    ("change", "value_and_limit"),
    [
        ({"opaque_row_bytes": 0}, "opaque_row_bytes=0.*16 to 32768"),
        ({"opaque_row_bytes": 40}, "opaque_row_bytes=40.*multiple of 16"),
        ({"opaque_row_bytes": 32784}, "opaque_row_bytes=32784.*16 to 32768"),
        ({"opaque_scale_words": -1}, "opaque_scale_words=-1.*0 to 4096"),
        ({"opaque_scale_words": 4097}, "opaque_scale_words=4097.*0 to 4096"),
        ({"scale_format": "ue8m0"}, "the caller does.*defaults"),
        ({"round_scale": True}, "the caller does.*defaults"),
    ],
)
def test_bad_opaque_rows_are_named_with_their_limit(
    change: dict[str, Any], value_and_limit: str
) -> None:
    with pytest.raises(ConfigError, match=re.compile(value_and_limit, re.DOTALL)):
        replace(OPAQUE, **change)


def test_experts_divide_over_ranks() -> None:
    GOOD.validate_for(8)
    with pytest.raises(ConfigError, match=r"num_experts=16 over num_ranks=3.*multiple of 3.*18"):
        GOOD.validate_for(3)
    with pytest.raises(ConfigError, match="num_ranks=73"):
        GOOD.validate_for(73)


def test_config_is_a_value() -> None:
    assert replace(GOOD) == GOOD
    with pytest.raises(FrozenInstanceError):
        GOOD.topk = 5  # type: ignore[misc]


def test_fingerprint_tells_every_field_and_the_number_of_ranks() -> None:
    changes: list[dict[str, Any]] = [
        {"num_experts": 32},
        {"topk": 5},
        {"hidden": 384},
        {"max_tokens": 33},
        {"num_chains": 3},
        {"dispatch_format": "bf16"},
        {"recv_format": "compact"},
        {"scale_format": "ue8m0"},
        {"round_scale": True},
        {"dispatch_format": "opaque", "opaque_row_bytes": 16},
        {"dispatch_format": "opaque", "opaque_row_bytes": 32},
        {"dispatch_format": "opaque", "opaque_row_bytes": 32, "opaque_scale_words": 1},
    ]
    prints = {replace(GOOD, **change).fingerprint(2) for change in changes}
    prints |= {GOOD.fingerprint(2), GOOD.fingerprint(4)}
    assert len(prints) == len(changes) + 2
    assert replace(GOOD).fingerprint(2) == GOOD.fingerprint(2)


def test_contiguous_rows_hold_the_worst_case() -> None:
    config = replace(GOOD, recv_format="contiguous", alignment=8)
    # Every token of 2 ranks chooses 4 of our 8 experts; each expert may end 7 rows early.
    assert config.recv_rows(2) == 2 * 32 * 4 + 8 * 7
    assert replace(GOOD, topk=12).recv_rows(2) == 2 * 32


def test_heap_grows_with_tokens_and_chains() -> None:
    small = layout_of(GOOD, 2).sizes
    assert layout_of(replace(GOOD, max_tokens=64), 2).sizes.heap > small.heap
    assert layout_of(replace(GOOD, num_chains=4), 2).sizes.heap > small.heap
    assert small.heap_stride % 4096 == 0
    assert small.heap_stride >= small.heap
