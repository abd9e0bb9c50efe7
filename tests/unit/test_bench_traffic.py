"""The bytes that the link must carry, against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from ep_runtime.bench.traffic import (
    Traffic,
    busiest_direction,
    least_traffic,
    message_counts,
    row_bytes,
    time_at,
)
from ep_runtime.errors import ConfigError

# Two ranks with two experts each: 0, 1 | 2, 3.
ROUTES = [
    torch.tensor(
        [[0, 1], [0, 2], [2, 3], [-1, -1]]
    ),  # rank 0: both local, both sides, remote, none
    torch.tensor([[0, 1]]),  # rank 1: one remote message for two experts
]


def test_a_token_counts_once_per_rank_whatever_its_number_of_experts_there() -> None:
    assert message_counts(ROUTES, num_experts=4).tolist() == [[2, 2], [1, 0]]


def test_a_rank_without_tokens_sends_nothing() -> None:
    routes = [torch.tensor([[3, 2]]), torch.empty(0, 2, dtype=torch.int64)]
    assert message_counts(routes, num_experts=4).tolist() == [[0, 1], [0, 0]]


def test_local_messages_do_not_use_the_link() -> None:
    assert busiest_direction(torch.tensor([[100, 2], [1, 100]])) == 2


def test_the_busier_direction_counts_not_the_sum_of_both() -> None:
    # rank 2 receives 3 + 4, nobody sends more than 5
    assert busiest_direction(torch.tensor([[0, 1, 3], [0, 0, 4], [1, 1, 0]])) == 7


@pytest.mark.parametrize(("wire", "expected"), [("fp8", 7168 + 56 * 4), ("bf16", 2 * 7168)])
def test_a_row_on_the_wire(wire: str, expected: int) -> None:
    assert row_bytes(wire, 7168) == expected


def test_combine_returns_a_row_for_each_message() -> None:
    counts = torch.tensor([[0, 3], [2, 0]])
    assert least_traffic(counts, "fp8", "fp8", 256).combine == 3 * (256 + 8)
    traffic = least_traffic(counts, "fp8", "bf16", 256)
    assert traffic == Traffic(dispatch=3 * (256 + 8), combine=3 * 512)
    assert traffic.of("pair") == 3 * (256 + 8) + 3 * 512


def test_sets_are_averaged() -> None:
    assert Traffic.mean([Traffic(10, 20), Traffic(20, 30)]) == Traffic(15, 25)


def test_parts_have_no_bytes_of_their_own() -> None:
    with pytest.raises(ConfigError, match="dispatch_send"):
        Traffic(1, 1).of("dispatch_send")


def test_time_of_bytes() -> None:
    # 370 GB/s are 370,000 bytes a microsecond
    assert time_at(740_000, 370.0) == pytest.approx(2.0)
