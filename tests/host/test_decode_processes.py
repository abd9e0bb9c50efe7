"""Decoding with a process per rank: what the command line does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ep_runtime.launch import launch, run_ranks
from ep_runtime.lm import checkpoint
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.decode import merge_reports
from ep_runtime.lm.job import DecodeJob, decode_rank

CONFIG = LmConfig(
    layers=2, hidden=128, heads=2, num_experts=8, topk=3, inner=16, shared_inner=32, max_context=48
)


@pytest.fixture
def job(tmp_path: Path) -> DecodeJob:
    path = tmp_path / "random.safetensors"
    checkpoint.save(path, checkpoint.random(CONFIG, seed=3).reference(), {})
    prompts = (b"In the beginning", b"And", b"It is a truth universally")
    return DecodeJob(prompts, 10, batch=2, backend="host", checkpoint=path, check=True)


@pytest.mark.slow
def test_four_processes_decode_what_the_reference_does(job: DecodeJob) -> None:
    report = merge_reports(launch(decode_rank, 4, dataclasses.replace(job, microbatches=2)))
    assert report.check is not None
    assert report.check.ok, str(report.check)
    assert report.check.compared == report.num_tokens == 30
    assert [text.encode(errors="replace")[:3] for text in report.texts] == [b"In ", b"And", b"It "]
    steps = len(b"It is a truth universally") + 10 - 1
    assert len(report.step_us) == steps
    assert sum(report.replays.values()) == 4 * steps
    assert report.num_ranks == 4


@pytest.mark.slow
def test_a_bad_job_fails_on_every_rank_with_its_reason(job: DecodeJob) -> None:
    bad = dataclasses.replace(job, num_tokens=100)
    outcomes = run_ranks(decode_rank, 2, bad)
    failures = [outcome.failure for outcome in outcomes]
    assert all(f is not None and f.kind == "ShapeError" for f in failures)
    assert all("at most 33 tokens" in str(failure) for failure in failures)
