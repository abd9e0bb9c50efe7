"""Are the rows that dispatch delivered the very bits of the reference, each in its place?"""

from __future__ import annotations

from dataclasses import replace

import torch

from ep_runtime import reference
from ep_runtime.bench.implementation import Problem
from ep_runtime.bench.routing import Inputs
from ep_runtime.config import EpConfig
from ep_runtime.handles import Received
from ep_runtime.reference import SCALE_GROUP, Expected, RankInput, quantize_fp8

DIGIT = 256  # a token number is written as two channels, each exact in bf16


def wrong_rows(received: Received, problem: Problem, expected: Expected, index: int) -> str:
    """What differs from the reference's `expected_places`, or ""."""
    for name in ("recv_count", "expert_offset", "num_messages", "layout_range"):
        wanted, got = getattr(expected, name), getattr(received, name)
        if wanted is not None and not torch.equal(got.cpu(), wanted):
            return f"{name} differs from the reference"
    if expected.source_token is not None:
        wrong = received.source_token is None or not torch.equal(
            received.source_token.cpu()[expected.valid], expected.source_token[expected.valid]
        )
        if wrong:
            return "source_token differs from the reference"
    if not _same_choices(received, expected):
        return "topk_idx or topk_weights differ from the reference"
    valid = expected.valid.to(problem.device)
    rows, scales = _full_rows(problem, expected, index)
    if not torch.equal(_bytes(received.x)[valid], _bytes(rows)):
        return "rows differ from the reference"
    if scales is None:
        return ""
    if received.scales is None:
        return "scales are missing"
    same = torch.equal(_bytes(received.scales)[valid], _bytes(scales))
    return "" if same else "scales differ from the reference"


def _same_choices(received: Received, expected: Expected) -> bool:
    """ "compact": local experts of every message, and the weights of those that are here."""
    if expected.topk_idx is None or expected.topk_weights is None:
        return received.topk_idx is None
    if received.topk_idx is None or received.topk_weights is None:
        return False
    idx, weights = expected.topk_idx[expected.valid], expected.topk_weights[expected.valid]
    got_idx = received.topk_idx.cpu()[expected.valid]
    got_weights = received.topk_weights.cpu()[expected.valid]
    return torch.equal(got_idx, idx) and torch.equal(got_weights[idx >= 0], weights[idx >= 0])


def expected_places(problem: Problem, config: EpConfig, index: int) -> Expected:
    """The reference's receive on this rank, of rows of 128 channels that hold token numbers.

    Enough to place rows of any width: the full ones are gathered by token number from the
    reference's quantisation of all ranks' inputs.
    """
    small = replace(config, hidden=SCALE_GROUP, dispatch_format="bf16")
    inputs = [
        _numbered(one, source * config.max_tokens)
        for source, one in enumerate(problem.everyone[index])
    ]
    return reference.dispatch(small, inputs)[problem.rank]


def _numbered(inputs: Inputs, first: int) -> RankInput:
    flat = first + torch.arange(len(inputs.x))
    x = torch.zeros(len(flat), SCALE_GROUP)
    x[:, 0], x[:, 1] = flat // DIGIT, flat % DIGIT
    return RankInput(x.bfloat16(), inputs.topk_idx, inputs.topk_weights)


def _full_rows(
    problem: Problem, expected: Expected, index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What must lie in the valid rows, on this rank's device."""
    numbers = expected.x[expected.valid]
    flat = (numbers[:, 0].float() * DIGIT + numbers[:, 1].float()).long()
    source, token = flat // problem.max_tokens, flat % problem.max_tokens
    # Ranks without tokens have no rows: number tokens through those that are there.
    ranks = problem.everyone[index]
    starts = torch.tensor([0, *(len(one.x) for one in ranks)]).cumsum(0)[:-1]
    at = (starts[source] + token).to(problem.device)
    x = torch.cat([one.x for one in ranks]).to(problem.device)
    if problem.dispatch_format == "bf16":
        return x[at], None
    values, scales = quantize_fp8(x)
    return values.view(torch.uint8)[at], scales[at]


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """The last dimension as bytes, so that equal means equal bits."""
    return rows.contiguous().view(torch.uint8)
