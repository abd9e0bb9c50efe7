"""Decoding with a process per rank: what the command line does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ep_runtime.errors import EpError
from ep_runtime.launch import launch
from ep_runtime.lm import checkpoint
from ep_runtime.lm.config import LmConfig
from ep_runtime.lm.decode import merge_reports
from ep_runtime.lm.job import DecodeJob, decode_rank
from ep_runtime.world import World

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


def bad_jobs(world: World, job: DecodeJob) -> list[str]:
    """What each of several unusable jobs raises on this rank."""
    one = world.rank == 1
    jobs = {
        "too long": dataclasses.replace(job, num_tokens=100),
        "missing on one rank": dataclasses.replace(job, checkpoint=Path("gone")) if one else job,
        "other prompts": dataclasses.replace(job, prompts=(b"x",) if one else (b"y",)),
        "other weights": _other_weights(job) if one else job,
    }
    heard = []
    for each in jobs.values():
        with pytest.raises(EpError) as caught:
            decode_rank(world, each)
        heard.append(f"{type(caught.value).__name__}: {caught.value}")
    return heard


def _other_weights(job: DecodeJob) -> DecodeJob:
    assert job.checkpoint is not None
    path = job.checkpoint.with_name("other.safetensors")
    checkpoint.save(path, checkpoint.random(CONFIG, seed=4).reference(), {})
    return dataclasses.replace(job, checkpoint=path)


@pytest.mark.slow
def test_an_unusable_job_is_refused_on_every_rank(job: DecodeJob) -> None:
    for rank, heard in enumerate(launch(bad_jobs, 2, job)):
        too_long, missing, prompts, weights = heard
        assert too_long.startswith("ShapeError")
        assert "at most 33 tokens" in too_long
        assert missing.startswith("CheckpointError")
        assert "gone is not there" in missing
        assert ("rank 1 failed" in missing) == (rank == 0)
        assert prompts.startswith("ConfigError: rank 1 was given another job")
        assert weights.startswith("ConfigError: rank 1 was given another checkpoint")
