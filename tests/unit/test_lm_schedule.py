"""Rows of a batch: every sequence is fed whole, in order, whatever the batch size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_runtime.errors import ShapeError
from ep_runtime.lm.schedule import Batch, assign, check_lengths, count_steps

PROMPTS = st.lists(st.binary(max_size=6), min_size=1, max_size=9)


@given(PROMPTS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_rows_feed_prompt_and_output_in_order(
    prompts: list[bytes], num_tokens: int, num_ranks: int, size: int
) -> None:
    """A pretend model answers with a counter; a cache per row holds what was fed to the row."""
    total_steps = count_steps(prompts, num_tokens, num_ranks, size)
    steps_of_ranks = []
    seen: set[int] = set()
    for rank in range(num_ranks):
        sequences = assign(prompts, num_tokens, rank, num_ranks)
        batch = Batch(sequences, size)
        cache: list[dict[int, int]] = [{} for _ in range(size)]
        steps = 0
        while batch.rows:
            for row, sequence in enumerate(batch.rows):
                if sequence.position == 0:
                    cache[row] = {}
                assert set(cache[row]) == set(range(sequence.position))
                cache[row][sequence.position] = sequence.token
                sequence.advance((sequence.index * 31 + sequence.position) % 256)
            for row, sequence in enumerate(batch.rows):
                fed = (sequence.prompt + bytes(sequence.generated))[: sequence.position]
                assert bytes(cache[row][i] for i in range(sequence.position)) == fed
            for source, target in batch.retire():
                cache[target] = cache[source]
            steps += 1
        steps_of_ranks.append(steps)
        for sequence in sequences:
            first = len(sequence.prompt) - 1
            want = [(sequence.index * 31 + first + i) % 256 for i in range(num_tokens)]
            assert list(sequence.generated) == want
            seen.add(sequence.index)
    assert seen == set(range(len(prompts)))
    assert total_steps == max(steps_of_ranks)


def test_prompts_go_round_the_ranks_and_some_may_have_none() -> None:
    ranks = [assign([b"a", b"b", b"c"], 1, rank, 4) for rank in range(4)]
    assert [[s.index for s in rank] for rank in ranks] == [[0], [1], [2], []]


def test_empty_prompt_starts_at_a_line_break() -> None:
    assert assign([b""], 1, 0, 1)[0].prompt == b"\n"


def test_one_prompt_takes_its_length_and_the_tokens_less_one() -> None:
    assert count_steps([b"abc"], 5, 4, 8) == 3 + 5 - 1


def test_lengths() -> None:
    check_lengths([b"x" * 10], 23, 32)
    with pytest.raises(
        ShapeError, match=r"prompt 1 has 10 bytes.*33 positions.*has 32.*at most 23"
    ):
        check_lengths([b"", b"x" * 10], 24, 32)
    with pytest.raises(ShapeError, match="tokens is 0"):
        check_lengths([b"a"], 0, 32)
    with pytest.raises(ShapeError, match="no prompts"):
        check_lengths([], 4, 32)
