"""Decoding over expert-parallel ranks on the host: the tokens are the single-rank reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ep_runtime import Buffer, ConfigError, EpConfig, ShapeError, virtual_ranks
from ep_runtime.config import DispatchFormat
from ep_runtime.lm import checkpoint
from ep_runtime.lm.check import GREEDY, TOLERANCE, Sampling, check_against_reference
from ep_runtime.lm.checkpoint import Checkpoint
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.decode import Decoder, DecodeReport
from ep_runtime.lm.parallel import DecodeStep, RankModel, ep_config, run_experts

CONFIG = LmConfig(
    layers=2, hidden=128, heads=2, num_experts=8, topk=3, inner=16, shared_inner=32, max_context=48
)
WEIGHTS = checkpoint.random(CONFIG, seed=11)
PROMPTS = [b"In the beginning", b"", b"It is a truth", b"x", b"universally acknowledged", b"ab"]


@contextmanager
def ranks(
    num_ranks: int,
    batch: int = 4,
    microbatches: int = 1,
    dispatch_format: DispatchFormat = "bf16",
    weights: Checkpoint = WEIGHTS,
) -> Iterator[list[Buffer]]:
    config = ep_config(
        weights.config, batch, microbatches=microbatches, dispatch_format=dispatch_format
    )
    buffers = virtual_ranks(config, num_ranks, backend="host")
    try:
        yield buffers
    finally:
        for buffer in buffers:
            buffer.close()


def decode(
    prompts: list[bytes],
    num_tokens: int = 8,
    num_ranks: int = 4,
    microbatches: int = 1,
    sampling: Sampling = GREEDY,
    batch: int = 4,
) -> DecodeReport:
    with ranks(num_ranks, batch, microbatches) as buffers:
        decoder = Decoder(WEIGHTS, buffers, microbatches)
        return decoder.run(prompts, num_tokens, sampling, keep_logits=True)


def assert_equals_reference(
    report: DecodeReport, sampling: Sampling = GREEDY, tolerance: float = TOLERANCE["bf16"]
) -> None:
    checked = check_against_reference(WEIGHTS, report.sequences, sampling, tolerance)
    assert checked.ok, str(checked)
    assert len(checked.ties) <= checked.compared // 10, str(checked)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_equal_the_reference(num_ranks: int, microbatches: int) -> None:
    report = decode(PROMPTS, num_ranks=num_ranks, microbatches=microbatches)
    assert [s.index for s in sorted(report.sequences, key=lambda s: s.index)] == list(range(6))
    assert all(len(s.generated) == 8 for s in report.sequences)
    assert_equals_reference(report)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2], PROMPTS[:5]])
def test_ranks_without_a_prompt_take_part_with_zero_tokens(prompts: list[bytes]) -> None:
    report = decode(prompts, microbatches=2)
    assert len(report.texts) == len(prompts)
    assert_equals_reference(report)


def test_more_prompts_than_rows_wait_for_a_row() -> None:
    prompts = [bytes([97 + i]) * (1 + i * 7 % 11) for i in range(11)]
    report = decode(prompts, num_ranks=2, batch=2, microbatches=2)
    assert_equals_reference(report)
    alone = decode(prompts, num_ranks=2, batch=8)
    assert report.texts == alone.texts


def test_the_whole_context_can_be_used() -> None:
    report = decode([b"y" * 40, b"z"], num_tokens=9)
    assert_equals_reference(report)


@pytest.mark.parametrize("seed", [1, 2])
def test_sampling_does_not_depend_on_ranks_or_microbatches(seed: int) -> None:
    sampling = Sampling(0.7, seed)
    one = decode(PROMPTS, num_ranks=1, sampling=sampling)
    four = decode(PROMPTS, num_ranks=4, microbatches=2, sampling=sampling)
    assert_equals_reference(one, sampling)
    assert_equals_reference(four, sampling)


def test_fp8_dispatch_stays_near_the_reference() -> None:
    with ranks(4, dispatch_format="fp8") as buffers:
        report = Decoder(WEIGHTS, buffers).run(PROMPTS, 8, keep_logits=True)
    checked = check_against_reference(WEIGHTS, report.sequences, GREEDY, TOLERANCE["fp8"])
    assert checked.ok, str(checked)
    assert checked.equal > 0.8 * checked.compared


def test_the_token_that_the_step_chose_is_the_one_that_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check must see what is printed without it, not another choice from the same logits."""
    join = DecodeStep._join

    def chooses_wrongly(step: DecodeStep, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**join(step, parts), "next": torch.full((len(parts[0]),), ord("X"))}

    monkeypatch.setattr(DecodeStep, "_join", chooses_wrongly)
    report = decode(PROMPTS[:1], num_ranks=2)
    assert report.generated == [b"X" * 8]
    assert not check_against_reference(WEIGHTS, report.sequences, GREEDY, 0.25).ok


def test_eager_equals_replayed() -> None:
    with ranks(2, microbatches=2) as buffers:
        decoder = Decoder(WEIGHTS, buffers, 2)
        replayed = decoder.run(PROMPTS, 6, keep_logits=True)
        eager = decoder.run(PROMPTS, 6, keep_logits=True, eager=True)
    assert replayed.texts == eager.texts
    assert replayed.bytes_dispatched == eager.bytes_dispatched
    assert replayed.bytes_combined == eager.bytes_combined
    for a, b in zip(replayed.sequences, eager.sequences, strict=True):
        assert a.logits is not None
        assert b.logits is not None
        assert torch.equal(a.logits, b.logits)


def test_a_second_run_starts_afresh() -> None:
    with ranks(2) as buffers:
        decoder = Decoder(WEIGHTS, buffers)
        first = decoder.run(PROMPTS, 6)
        decoder.run([b"something else"] * 5, 9)
        assert decoder.run(PROMPTS, 6).texts == first.texts


def test_report_counts_steps_replays_bytes_and_streams_tokens() -> None:
    heard: dict[int, bytearray] = {i: bytearray() for i in range(3)}
    with ranks(2, batch=2) as buffers:
        decoder = Decoder(WEIGHTS, buffers)
        report = decoder.run(
            [b"abc", b"d", b"efg"], 4, on_token=lambda i, byte: heard[i].append(byte)
        )
    # Rank 0 has prompts 0 and 2 of 3 bytes for 3 + 4 - 1 steps; rank 1 is done after 4.
    assert len(report.step_us) == 6
    assert report.replays == {2: 6}
    assert report.num_tokens == 12
    assert {s.index: s.generated for s in report.sequences} == heard
    tokens = 6 * 2 + 4
    rows = tokens * CONFIG.layers
    row_bytes = 2 * CONFIG.hidden
    assert rows * row_bytes <= report.bytes_combined <= 2 * rows * row_bytes
    assert report.bytes_dispatched > report.bytes_combined  # a row and its header
    assert report.seconds * 1e6 >= sum(report.step_us)
    assert report.tokens_per_second == pytest.approx(12 / report.seconds)


def test_padding_rows_change_nothing() -> None:
    """Rows from num_tokens on may hold anything."""
    with ranks(2) as buffers:
        models = [RankModel(WEIGHTS, buffer) for buffer in buffers]
        step = DecodeStep(models)
        inputs = step.make_inputs(4)
        counts = [torch.tensor(3, dtype=torch.int32), torch.tensor(1, dtype=torch.int32)]
        for mine in inputs:
            mine["tokens"].random_(256)
            mine["positions"].zero_()
        first = step(inputs, counts)
        for mine, count in zip(inputs, counts, strict=True):
            mine["tokens"][int(count) :] = 77
            mine["positions"][int(count) :] = 5
        second = step(inputs, counts)
    for a, b, count in zip(first, second, counts, strict=True):
        assert torch.equal(a["logits"][: int(count)], b["logits"][: int(count)])
        assert bool(b["logits"].isfinite().all())


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_microbatches_share_the_real_rows_evenly(microbatches: int) -> None:
    with ranks(1, batch=7) as buffers:
        model = RankModel(WEIGHTS, buffers[0])
        inputs = {name: torch.arange(7) for name in ("tokens", "positions")}
        for real in range(8):
            lanes = model.lanes(inputs, torch.tensor(real, dtype=torch.int32), microbatches)
            counts = [int(lane.num_tokens) for lane in lanes]
            assert sum(counts) == real
            assert max(counts) - min(counts) <= 1
            rows = [
                row
                for lane, count in zip(lanes, counts, strict=True)
                for row in lane.tokens[:count].tolist()
            ]
            assert sorted(rows) == list(range(real))
            assert all(lane.num_tokens.dtype == torch.int32 for lane in lanes)


def test_experts_dequantise_fp8_rows_with_the_scale_of_each_group() -> None:
    """Two groups of 128 channels, of very different size, against float64."""
    weights = checkpoint.random(dataclasses.replace(CONFIG, hidden=256), seed=2)
    with ranks(1, dispatch_format="fp8", weights=weights) as buffers:
        x = torch.cat((torch.randn(4, 128), 30 * torch.randn(4, 128)), dim=-1).bfloat16()
        index = torch.tensor([[0, 1, 2]] * 4)
        received = buffers[0].dispatch(x, index, torch.full((4, 3), 1 / 3)).wait()
        layer = RankModel(weights, buffers[0]).layers[0]
        y = run_experts(received, layer.gate_up, layer.down)[:3, :4]
        buffers[0].combine(torch.zeros_like(received.x).bfloat16(), received.handle).wait()
        assert received.scales is not None
        scales = received.scales[:3, :4].double().repeat_interleave(128, -1)
        rows = received.x[:3, :4].double() * scales
    torch.testing.assert_close(rows, x.double().expand(3, -1, -1), atol=0.02, rtol=0.07)
    gate, up = torch.einsum("ltd,lfd->ltf", rows, layer.gate_up[:3].double()).chunk(2, -1)
    inner = gate / (1 + (-gate).exp()) * up
    want = torch.einsum("ltf,lhf->lth", inner, layer.down[:3].double())
    error = (y.double() - want).norm() / want.norm()
    assert error < 0.01


def test_group_of_another_shape_is_refused() -> None:
    other = checkpoint.random(LmConfig(hidden=256, layers=1))
    told = "num_experts=16, the checkpoint 8"
    with ranks(1, weights=other) as buffers, pytest.raises(ConfigError, match=told):
        RankModel(WEIGHTS, buffers[0])


def test_group_with_another_receive_format_is_refused() -> None:
    config = EpConfig(num_experts=8, topk=3, hidden=128, max_tokens=2, recv_format="compact")
    (buffer,) = virtual_ranks(config, 1, backend="host")
    with buffer, pytest.raises(ConfigError, match=r"'compact'.*take 'batched'"):
        RankModel(WEIGHTS, buffer)


def test_more_microbatches_than_chains_are_refused() -> None:
    told = r"microbatches=2.*the group has 1"
    with ranks(1, microbatches=1) as buffers, pytest.raises(ConfigError, match=told):
        Decoder(WEIGHTS, buffers, 2)


def test_text_longer_than_the_context_is_refused_before_any_step() -> None:
    with ranks(2) as buffers:
        decoder = Decoder(WEIGHTS, buffers)
        with pytest.raises(ShapeError, match=r"50 bytes.*model has 48"):
            decoder.run([b"a" * 50], 1)
        assert_equals_reference(decoder.run([b"fine"], 4, keep_logits=True))
