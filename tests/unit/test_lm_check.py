"""The check of decoded tokens: what is equal, a tie, a mismatch."""

import pytest
import torch

from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.lm import checkpoint
from ep_runtime.lm.check import GREEDY, Sampling, check_against_reference, merge_checks
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.decode import DecodedSequence

CONFIG = LmConfig(
    layers=1, hidden=128, heads=2, num_experts=4, topk=2, inner=16, shared_inner=16, max_context=64
)
CHECKPOINT = checkpoint.random(CONFIG, seed=5)


def logits_of(sequence: DecodedSequence) -> torch.Tensor:
    assert sequence.logits is not None
    return sequence.logits


def decode_by_reference(prompt: bytes, count: int, sampling: Sampling = GREEDY) -> DecodedSequence:
    model = CHECKPOINT.reference()
    text, kept = prompt, []
    for _ in range(count):
        logits = model(torch.tensor([list(text)]))[0][0, -1]
        kept.append(logits)
        text += bytes((int(sampling.scores(logits, 0, len(text) - 1).argmax()),))
    return DecodedSequence(0, prompt, text[len(prompt) :], torch.stack(kept))


def replace_token(sequence: DecodedSequence, at: int, token: int) -> DecodedSequence:
    changed = bytearray(sequence.generated)
    changed[at] = token
    return DecodedSequence(
        0, sequence.prompt, bytes(changed[: at + 1]), logits_of(sequence)[: at + 1]
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, seed=3)])
def test_the_references_own_text_is_equal(sampling: Sampling) -> None:
    sequence = decode_by_reference(b"hello", 20, sampling)
    report = check_against_reference(CHECKPOINT, [sequence], sampling, 0.01)
    assert (report.compared, report.equal, report.ok) == (20, 20, True)
    assert report.max_error < 1e-3


def test_a_token_that_its_own_logits_do_not_choose_is_a_mismatch() -> None:
    """The logits are the reference's to the last bit; the engine took another byte."""
    sequence = decode_by_reference(b"hello", 10)
    worst = int(logits_of(sequence)[4].argmin())
    wrong = replace_token(sequence, 4, worst)
    report = check_against_reference(CHECKPOINT, [wrong], GREEDY, 0.25)
    assert not report.ok
    assert report.mismatches[0].position == 4 + len(b"hello") - 1
    assert report.mismatches[0].tokens[0] == worst
    assert "mismatch: prompt 0 position 8" in str(report)


def test_a_token_from_logits_within_tolerance_is_a_tie_and_is_shown() -> None:
    sequence = decode_by_reference(b"hello", 10)
    first, second = logits_of(sequence)[9].topk(2).indices.tolist()
    gap = float(logits_of(sequence)[9, first] - logits_of(sequence)[9, second])
    logits = logits_of(sequence).clone()
    logits[9, second] += gap + 0.01
    decoded = replace_token(
        DecodedSequence(0, sequence.prompt, sequence.generated, logits), 9, second
    )
    close = check_against_reference(CHECKPOINT, [decoded], GREEDY, gap + 0.02)
    assert close.ok
    assert [tie.tokens for tie in close.ties] == [(second, first)]
    assert close.ties[0].error == pytest.approx(gap + 0.01, abs=1e-4)
    far = check_against_reference(CHECKPOINT, [decoded], GREEDY, gap / 2)
    assert not far.ok
    assert len(far.mismatches) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_mismatches(value: float) -> None:
    """Whatever token they give, here or in the reference: nothing was compared."""
    sequence = decode_by_reference(b"hello", 10)
    logits = logits_of(sequence).clone()
    logits[3, 7] = value
    broken = DecodedSequence(0, sequence.prompt, sequence.generated, logits)
    report = check_against_reference(CHECKPOINT, [broken], GREEDY, 0.25)
    assert not report.ok
    assert [one.position for one in report.mismatches] == [3 + len(b"hello") - 1]
    assert report.max_error == float("inf")


def test_tokens_without_logits_cannot_be_checked() -> None:
    with pytest.raises(ShapeError, match="prompt 3 has no logits"):
        check_against_reference(CHECKPOINT, [DecodedSequence(3, b"a", b"b")], GREEDY, 0.1)


def test_nothing_compared_is_not_a_pass() -> None:
    assert not check_against_reference(CHECKPOINT, [], GREEDY, 0.1).ok


def test_merging_adds_up() -> None:
    sequence = decode_by_reference(b"ab", 6)
    good = check_against_reference(CHECKPOINT, [sequence], GREEDY, 0.1)
    wrong = replace_token(sequence, 2, int(logits_of(sequence)[2].argmin()))
    bad = check_against_reference(CHECKPOINT, [wrong], GREEDY, 0.1)
    merged = merge_checks([good, bad])
    assert (merged.compared, merged.equal, merged.ok) == (9, 8, False)


def test_sampling_depends_on_seed_prompt_and_position_only() -> None:
    logits = torch.randn(256)
    draw = Sampling(1.0, seed=1).scores(logits, 2, 3)
    assert torch.equal(draw, Sampling(1.0, seed=1).scores(logits, 2, 3))
    for other in (Sampling(1.0, 2).scores(logits, 2, 3), Sampling(1.0, 1).scores(logits, 3, 2)):
        assert not torch.equal(draw, other)


def test_sampling_follows_the_softmax() -> None:
    logits = torch.full((256,), -50.0)
    logits[:3] = torch.tensor([1.0, 0.0, -1.0])
    draws = [int(Sampling(2.0, 9).scores(logits, 0, p).argmax()) for p in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=3)[:3] / 4000
    torch.testing.assert_close(share, (logits[:3] / 2).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperatures_that_would_turn_the_ranking_round_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature=.* must be finite and at least 0"):
        Sampling(temperature)


def test_seeds_that_no_generator_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed=-1 must be at least 0"):
        Sampling(1.0, seed=-1)
