"""Combines whose rows travel packed: no bit is lost, and rows that do not pack go as they are."""

from __future__ import annotations

from collections.abc import Callable

import packing
import programs
import pytest
import torch
from expect import below, check_combined, check_received, random_group, random_tokens
from ranks import Group, Place

from ep_runtime.normal.reference import RankTokens

OpenGroup = Callable[..., Group]
EVERY = 1 << 20  # of the GPU's SMs
TOPK = 4


def test_most_rows_pack_and_which_do_not_is_known(rng: torch.Generator) -> None:
    """The model that the other tests compare with, on rows of which it is plain."""
    rows = packing.varied_rows(rng, 8, 7 * packing.PART)
    masks = packing.packed_pieces(rows).tolist()
    assert masks[0] == masks[1] == masks[4] == masks[7] == 0b11
    assert masks[2] == masks[3] == 0
    assert masks[5] in (0b01, 0b10)  # one part of one piece has an escape too many
    assert masks[6] in (0b01, 0b10)  # the channel's step is too small beside it
    rows[0, -1] = float("inf")
    assert packing.packed_pieces(rows)[0] == 0b01


class Combines:
    """Pairs of a group, whose combines are of varied rows and checked to the last bit."""

    def __init__(self, group: Group, num_ranks: int, rng: torch.Generator) -> None:
        self.group, self.ranks, self.rng = group, num_ranks, rng
        self.experts = TOPK * num_ranks
        self.most_sms: int = group.run(programs.query, [("max_sms",)] * num_ranks)[0]

    def all_send(self, tokens: int, hidden: int) -> list[RankTokens]:
        return [
            random_tokens(self.rng, tokens, hidden, TOPK, self.experts) for _ in range(self.ranks)
        ]

    def run(
        self,
        inputs: list[RankTokens],
        num_sms: list[int],
        *,
        weighted: bool = True,
        biases: int = 0,
        extra: int = 0,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of every rank: the rows that others sent home, and its inbox's word for each of them."""
        rng, group = self.rng, self.group
        hidden = inputs[0].x.shape[1]
        tokens = [one.x.shape[0] for one in inputs]
        group.run(programs.poison)
        options = {"num_experts": self.experts}
        got = group.run(programs.dispatch_with, [(one, options) for one in inputs])
        expected = check_received(got, inputs, self.experts)
        sources = [one.source for one in expected]
        rows = [packing.varied_rows(rng, len(source), hidden) for source in sources]
        weights = [torch.randn((len(source), TOPK), generator=rng) for source in sources]
        bias = [
            [torch.randn((t, hidden), generator=rng).bfloat16() for _ in range(biases)]
            for t in tokens
        ]
        back = group.run(
            programs.combine,
            [
                (y, w if weighted else None, b, "last", extra, sms)
                for y, w, b, sms in zip(rows, weights, bias, num_sms, strict=True)
            ],
        )
        check_combined([y for y, _ in back], rows, expected, tokens, bias)
        if weighted:
            check_combined([w for _, w in back], weights, expected, tokens)
        home = [packing.rows_home(rank, rows, sources) for rank in range(self.ranks)]
        words = group.run(
            programs.packed_words, [(len(one), hidden, TOPK if weighted else 0) for one in home]
        )
        return home, words


def open_combines(
    open_group: OpenGroup, place: Place, rng: torch.Generator, tokens: int, hidden: int
) -> Combines:
    group = open_group(max_tokens=tokens, max_hidden=hidden, max_experts=64, max_topk=TOPK)
    return Combines(group, place.num_ranks, rng)


@pytest.mark.parametrize("num_sms", [packing.LEAST_SMS, 64, EVERY])
@pytest.mark.parametrize("hidden", [1024, 3072, 7168, 16384])
def test_rows_come_home_whole_packed_or_not(
    open_group: OpenGroup, place: Place, rng: torch.Generator, hidden: int, num_sms: int
) -> None:
    combines = open_combines(open_group, place, rng, 24, hidden)
    sms = min(num_sms, combines.most_sms)
    for _ in range(2):
        home, words = combines.run(combines.all_send(24, hidden), [sms] * place.num_ranks)
        if place.backend == "host" or sms < packing.LEAST_SMS:
            assert all((one == programs.UNWRITTEN).all() for one in words)
            continue
        for rows, found in zip(home, words, strict=True):
            assert torch.equal(found, packing.packed_pieces(rows))


def test_what_comes_with_packed_rows(
    open_group: OpenGroup, place: Place, rng: torch.Generator
) -> None:
    """Biases, rows with a stride, weights or none, ranks with few tokens or none, ranks that pack
    beside ranks that do not."""
    combines = open_combines(open_group, place, rng, 24, 2048)
    few, many = packing.LEAST_SMS - 1, combines.most_sms
    for turn in range(6):
        hidden = (1024, 2048)[turn % 2]
        inputs = random_group(rng, place.num_ranks, hidden, TOPK, combines.experts, 24)
        num_sms = [many if below(rng, 3) else min(few, many) for _ in inputs]
        combines.run(inputs, num_sms, weighted=turn % 2 == 0, biases=turn % 3, extra=8 * (turn % 4))


@pytest.mark.parametrize(
    ("hidden", "num_sms"),
    [
        pytest.param(7168, packing.LEAST_SMS - 1, id="few SMs"),
        pytest.param(1152, EVERY, id="not whole parts"),
    ],
)
def test_nothing_is_packed(
    open_group: OpenGroup, place: Place, rng: torch.Generator, hidden: int, num_sms: int
) -> None:
    combines = open_combines(open_group, place, rng, 16, hidden)
    sms = min(num_sms, combines.most_sms)
    _, words = combines.run(combines.all_send(16, hidden), [sms] * place.num_ranks)
    assert all((one == programs.UNWRITTEN).all() for one in words)


def test_chunks_of_several_rows(open_group: OpenGroup, place: Place, rng: torch.Generator) -> None:
    """More rows from rank to rank than a combine has chunks: rows of both kinds in a chunk."""
    if place.num_ranks != 2:
        pytest.skip("two ranks have the most rows from one to another")
    combines = open_combines(open_group, place, rng, 2600, 1024)
    home, words = combines.run(combines.all_send(2600, 1024), [combines.most_sms] * 2)
    assert min(len(one) for one in home) > 2048
    if place.backend == "cuda" and combines.most_sms >= packing.LEAST_SMS:
        assert torch.equal(torch.cat(words), packing.packed_pieces(torch.cat(home)))
