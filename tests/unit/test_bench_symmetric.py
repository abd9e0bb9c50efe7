"""The symmetric-memory all-to-all peer, with a stand-in that moves rows by the same splits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpus import OWN_PROCESS
from test_bench_host import OPTIONS

from ep_runtime.bench import low_latency
from ep_runtime.bench.candidates import peer_candidates
from ep_runtime.bench.measure import measure_case
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.bench.peers import symmetric
from ep_runtime.bench.peers.wire import Wire
from ep_runtime.bench.records import Record, read_records
from ep_runtime.launch import launch
from ep_runtime.world import World


def rows_by_splits(
    rows: torch.Tensor, to: torch.Tensor, splits: torch.Tensor, found: torch.Tensor, name: str
) -> None:
    """What the operation does, over Gloo: splits from tensors, offsets written back."""
    assert (rows.shape[0], to.shape[0]) != (0, 0)
    received = torch.empty_like(splits)
    dist.all_to_all_single(received, splits.clone())
    found[0] = received
    found[1] = received.cumsum(0) - received
    pieces = received.tolist(), splits.tolist()
    out = torch.empty(sum(pieces[0]), *rows.shape[1:], dtype=rows.dtype)
    dist.all_to_all_single(out, rows[: sum(pieces[1])].clone(), *pieces)
    to[: len(out)] = out


def several(world: World, options: list[LowLatencyOptions]) -> list[list[Record]]:
    return [run(world, one) for one in options]


def run(world: World, options: LowLatencyOptions) -> list[Record]:
    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(shape), 77, dtype=dtype)

    with low_latency.open_session(world, options) as session:
        maker = symmetric.SymmetricPeers(
            options, session.group, session.device, rows_by_splits, allocate
        )
        (candidate,) = peer_candidates(maker.peers(("",)))
        records = []
        for wire in options.dispatch_formats:
            for tokens in options.tokens:
                problem = low_latency._problem(session, 8, wire, tokens)
                records += measure_case(session, candidate, problem)
        return records


def test_rows_go_by_the_splits_and_come_back() -> None:
    skews = ("uniform", "one-rank", "half-empty")
    options = [replace(OPTIONS, skew=skew, parts=False) for skew in skews]  # type: ignore[arg-type]
    first, second = launch(several, 2, options)
    assert first == second
    for records in first:
        assert [(r.status, r.reason) for r in records] == [("ok", "")] * 4
        assert {r.case.impl for r in records} == {"torch-symm-a2a"}


def test_rows_and_ranks_divide_into_the_blocks_of_its_kernel() -> None:
    for wire_format in ("fp8", "bf16"):
        wire = Wire(7168, 8, wire_format, symmetric.ROW_ALIGNMENT)
        assert wire.row_bytes % 64 == 0
        assert wire.row_bytes >= Wire(7168, 8, wire_format).row_bytes
    cuda = torch.device("cuda")
    assert "power of two" in symmetric._missing(cuda, 6)
    assert "needs GPUs" in symmetric._missing(torch.device("cpu"), 2)


@pytest.mark.parametrize("row_bytes", [128, 7552, 14336, 14592, 65536, 131072])
@pytest.mark.parametrize("num_ranks", [2, 4, 8, 64])
def test_blocks_of_the_operation_divide_every_peers_bytes(num_ranks: int, row_bytes: int) -> None:
    """By the operation's own rule for its blocks; else it stops the GPU with an assertion."""
    before = 0
    for least in (1, 2, 7, 100, 101, 999, 2048):
        shown = symmetric.rows_to_show(least, row_bytes, num_ranks)
        assert shown >= max(least, before)  # room for the most tokens is room for fewer
        before = shown
        blocks = -(-shown * row_bytes // (16 * 512 * 8))
        blocks = min(-(-blocks // num_ranks) * num_ranks, 64)
        for_a_peer = max(blocks // num_ranks, 1)
        assert all(rows * row_bytes % for_a_peer == 0 for rows in range(1, 20))


def test_it_leaves_an_nvshmem_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "nvshmem_running", lambda: True)
    assert "EP_MEMORY=ipc" in symmetric._missing(torch.device("cuda"), 2)


def test_the_operation_of_this_torch_is_the_one_that_is_called() -> None:
    """A torch that changes it makes the peer absent; here is where we learn of it."""
    try:
        schema = torch.ops.symm_mem.all_to_all_vdev.default._schema
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this torch has no all_to_all_vdev: {error}")
    assert tuple(argument.name for argument in schema.arguments) == symmetric.SCHEMA


@pytest.mark.multi
@pytest.mark.alone
def test_the_operation_itself_is_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ep_runtime.bench", "low-latency", "--ranks", "2"]
    command += ["--peers", symmetric.NAME, "--recv-formats", "compact", "--tokens", "1,100"]
    command += ["--experts", "32", "--pairs", "10", "--replays", "3", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, **OWN_PROCESS, "EP_MEMORY": "ipc"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    (path,) = tmp_path.glob("low-latency-*.json")
    found = [r for r in read_records(path) if r.case.impl.startswith(symmetric.NAME)]
    absent = [r.reason for r in found if r.status == "absent"]
    if absent:
        pytest.skip(absent[0])
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = [r for r in found if r.op == "pair"]
    assert {r.case.impl.removeprefix(symmetric.NAME) for r in pairs} == {
        "",
        "+quantise",
        "+kernels",
    }
    assert [(r.status, r.reason) for r in pairs] == [("ok", "")] * 6
