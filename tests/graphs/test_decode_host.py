"""DecodeGraphs on CPU ranks: choosing buckets, replaying, and refusing what cannot be right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from layer import CONFIG, Layer, empty_inputs, random_step, require_right
from steps import Tensors

from ep_runtime import Buffer, CaptureError, ShapeError, env, virtual_ranks
from ep_runtime.graphs import Buckets, DecodeGraphs
from ep_runtime.graphs.record import shared_regions
from ep_runtime.layout import layout_of

RANKS = 3


def group_inputs(rows: int) -> list[Tensors]:
    return [empty_inputs(rows) for _ in range(RANKS)]


@pytest.fixture
def buffers() -> Iterator[list[Buffer]]:
    made = virtual_ranks(CONFIG, RANKS, backend="host")
    yield made
    for buffer in made:
        buffer.close()


@pytest.fixture
def layer(buffers: list[Buffer]) -> Layer:
    return Layer(buffers)


def capture(layer: Layer, **options: Any) -> DecodeGraphs[list[Tensors], Sequence[int]]:
    return DecodeGraphs(layer.buffers, layer, group_inputs, (2, 4, 8), **options)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 2, 0), (4, 3, 4), (8, 0, 1), (8, 8, 8)])
def test_replay_gives_what_the_reference_gives(layer: Layer, counts: tuple[int, ...]) -> None:
    graphs = capture(layer)
    for _ in range(2):
        inputs, wanted = random_step(counts)
        require_right(graphs.replay(inputs, counts), wanted)
        inputs, wanted = random_step(counts)
        require_right(graphs.eager(inputs, counts), wanted)


def test_replay_takes_the_smallest_bucket_and_counts(layer: Layer) -> None:
    graphs = capture(layer)
    for most in (0, 2, 3, 4, 8, 1):
        inputs, _ = random_step((most, 0, min(most, 1)))
        graphs.replay(inputs, (most, 0, min(most, 1)))
    assert {r.sizes[0]: r.replays for r in graphs.report()} == {2: 3, 4: 2, 8: 1}


def test_ranks_may_take_different_buckets_where_that_was_captured(layer: Layer) -> None:
    graphs = capture(layer, mixed=[(2, 8, 2)])
    for counts in [(1, 8, 0), (3, 8, 0)]:
        inputs, wanted = random_step(counts)
        require_right(graphs.replay(inputs, counts), wanted)
    replays = {r.sizes: r.replays for r in graphs.report()}
    assert replays[2, 8, 2] == 1
    assert replays[8, 8, 8] == 1


def test_every_bucket_is_warmed_up_and_recorded_once(layer: Layer) -> None:
    capture(layer, warmup=3)
    assert layer.runs == 3 * (3 + 1)


def test_inputs_may_be_filled_in_place(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, wanted = random_step((2, 1, 2))
    for static, fresh in zip(graphs.static_inputs(2), inputs, strict=True):
        for name, tensor in fresh.items():
            static[name][: tensor.shape[0]] = tensor
    require_right(graphs.replay(None, (2, 1, 2)), wanted)


def test_a_larger_bucket_than_needed_gives_the_same(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, wanted = random_step((1, 2, 0))
    graphs.load(inputs, (1, 2, 0))
    for bucket in (8, 2, 4):
        whole = graphs.replay_bucket(bucket)
        assert [rank["out"].shape[0] for rank in whole] == [bucket] * RANKS
        real = [{"out": r["out"][: w.shape[0]]} for r, w in zip(whole, wanted, strict=True)]
        require_right(real, wanted)


def test_a_bucket_smaller_than_what_was_loaded_is_refused(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, _ = random_step((1, 3, 0))
    graphs.load(inputs, (1, 3, 0))
    runs = layer.runs
    with pytest.raises(ShapeError, match=r"bucket 2 is smaller than the \(1, 3, 0\) tokens"):
        graphs.replay_bucket(2)
    assert layer.runs == runs


@pytest.mark.parametrize("counts", [(1, 9, 1), (1, -1, 1)])
def test_what_fits_no_bucket_is_not_loaded(layer: Layer, counts: tuple[int, ...]) -> None:
    graphs = capture(layer)
    with pytest.raises(ShapeError, match="num_tokens is"):
        graphs.load([empty_inputs(9) for _ in counts], counts)
    with pytest.raises(ShapeError, match="num_tokens is"):
        graphs.replay(None, counts)


def test_numbers_of_tokens_may_be_of_any_integer_type(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, wanted = random_step((2, 1, 0))
    require_right(graphs.replay(inputs, np.array([2, 1, 0])), wanted)  # type: ignore[arg-type]
    for counts in (2.0, "2", torch.tensor([2, 1, 0]), [torch.tensor(1)] * RANKS, (2, None, 0)):
        with pytest.raises(ShapeError, match="num_tokens is"):
            graphs.replay(inputs, counts)  # type: ignore[arg-type]
    assert graphs.audit(np.int64(4)).launches == graphs.audit(4).launches  # type: ignore[arg-type]


def test_a_load_that_is_refused_for_one_rank_changes_nothing(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, wanted = random_step((1, 2, 0))
    graphs.load(inputs, (1, 2, 0))
    others, _ = random_step((5, 5, 5))
    with pytest.raises(ShapeError, match="at least num_tokens rows"):
        graphs.load([*others[:2], empty_inputs(4)], (5, 5, 5))
    pairs = zip(graphs.replay_bucket(2), wanted, strict=True)
    require_right([{"out": rank["out"][: w.shape[0]]} for rank, w in pairs], wanted)


def test_outputs_that_only_some_buckets_have_are_cut(layer: Layer) -> None:
    def step(inputs: list[Tensors], counts: list[torch.Tensor]) -> list[Tensors]:
        rows = inputs[0]["x"].shape[0]
        more = {"aux": torch.ones(rows)} if rows > 2 else {}
        return [out | more for out in layer(inputs, counts)]

    graphs = DecodeGraphs(layer.buffers, step, group_inputs, (size for size in (2, 4, 8)))
    inputs, _ = random_step((3, 1, 0))
    assert [r["aux"].shape[0] for r in graphs.replay(inputs, (3, 1, 0))] == [3, 1, 0]


def test_the_memory_that_peers_write_is_known(buffers: list[Buffer]) -> None:
    """What an audit is told: every rank's heap, without the statistics that a reset zeroes."""
    regions = shared_regions(buffers)
    assert len(regions) == RANKS * RANKS
    for buffer in buffers:
        own = regions[buffer.rank * RANKS + buffer.rank]
        assert own.label == f"the heap of rank {buffer.rank}"
        assert own.num_bytes == layout_of(buffer.config, RANKS).sizes.heap
        assert not any(r.touches(*buffer.stats_region(0)) for r in regions)


def test_outputs_that_happen_to_have_as_many_rows_come_whole(layer: Layer) -> None:
    def step(inputs: list[Tensors], counts: list[torch.Tensor]) -> list[Tensors]:
        local = layer.buffers[0].local_experts
        return [out | {"loads": torch.ones(len(local))} for out in layer(inputs, counts)]

    graphs = DecodeGraphs(layer.buffers, step, group_inputs, (2, 4, 8))
    assert len(layer.buffers[0].local_experts) == 2
    inputs, wanted = random_step((1, 1, 1))
    for outputs in (graphs.replay(inputs, (1, 1, 1)), graphs.eager(inputs, (1, 1, 1))):
        require_right(outputs, wanted)
        assert [rank["loads"].shape[0] for rank in outputs] == [2] * RANKS


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (torch.zeros(2), "returned a Tensor"),
        ([{}] * (RANKS - 1), "for each of the 3 ranks"),
        ([{"out": 1.0}] * RANKS, r"returned \{'out': float\}"),
    ],
)
def test_a_step_that_returns_no_dicts_of_tensors_is_refused(
    layer: Layer, outputs: Any, message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        DecodeGraphs(layer.buffers, lambda *_: outputs, group_inputs, (2,))


def test_buckets_share_their_inputs_and_keep_their_outputs(layer: Layer) -> None:
    graphs = capture(layer)
    assert graphs.static_inputs(2)[0]["x"].data_ptr() == graphs.static_inputs(8)[0]["x"].data_ptr()
    address = graphs.static_outputs(4)[1]["out"].data_ptr()
    inputs, _ = random_step((3, 4, 3))
    assert graphs.replay(inputs, (3, 4, 3))[1]["out"].data_ptr() == address


def test_a_replay_zeroes_the_statistics_of_its_chains_first(layer: Layer) -> None:
    graphs = capture(layer)
    inputs, _ = random_step((2, 2, 2))
    seen = []
    for _ in range(3):
        graphs.replay(inputs, (2, 2, 2))
        seen.append([buffer.stats(0) for buffer in layer.buffers])
    assert seen[0] == seen[1] == seen[2]
    assert sum(stats.messages_sent for stats in seen[0]) > 0
    graphs.eager(inputs, (2, 2, 2))
    assert layer.buffers[0].stats(0).messages_sent == 2 * seen[0][0].messages_sent


def test_the_audit_lists_operations_and_resets(layer: Layer) -> None:
    audit = capture(layer).audit(4)
    assert len(audit.operations) == 4 * RANKS
    assert audit.launches == 4 * RANKS
    assert len(audit.resets) == RANKS
    address, num_bytes = layer.buffers[1].stats_region(0)
    assert (audit.resets[1].address, audit.resets[1].num_bytes) == (address, num_bytes)


def test_the_report_counts_static_bytes(layer: Layer) -> None:
    report = capture(layer).report()[0]
    row = 2 * CONFIG.hidden + 8 * CONFIG.topk + 4 * CONFIG.topk  # x, idx, weights
    assert report.sizes == (2,) * RANKS
    assert report.static_bytes == RANKS * 2 * (row + 2 * CONFIG.hidden)


def test_several_graphs_share_a_buffer(layer: Layer) -> None:
    first, other = capture(layer), Layer(layer.buffers)
    other.chain = 1
    second = capture(other)
    for graphs in (first, second, second, first):
        inputs, wanted = random_step((5, 0, 2))
        require_right(graphs.replay(inputs, (5, 0, 2)), wanted)


def test_the_time_budget_is_longer_only_while_capturing(layer: Layer) -> None:
    for buffer in layer.buffers:
        buffer.set_time_budget(3.0)
    seen = []
    run = layer.__call__

    def step(inputs: list[Tensors], counts: list[torch.Tensor]) -> list[Tensors]:
        seen.append(layer.buffers[0].time_budget_s)
        return run(inputs, counts)

    DecodeGraphs(layer.buffers, step, group_inputs, (2,))
    assert min(seen) >= 60.0
    assert layer.buffers[0].time_budget_s == 3.0


@pytest.mark.parametrize("chosen", [None, 90.0])
def test_a_budget_that_was_chosen_stays_and_that_of_the_warm_up_ends(
    layer: Layer, chosen: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EP_TIMEOUT_S", raising=False)
    assert layer.buffers[0].time_budget_s == env.read().warmup_timeout_s
    if chosen is not None:
        for buffer in layer.buffers:
            buffer.set_time_budget(chosen)
    capture(layer)
    assert [buffer.time_budget_s for buffer in layer.buffers] == [chosen or 10.0] * RANKS


def test_a_step_that_changes_its_sequence_is_caught_before_a_peer_notices(layer: Layer) -> None:
    graphs = capture(layer)
    layer.chain = 1
    inputs, _ = random_step((1, 1, 1))
    with pytest.raises(CaptureError, match="chain 1 rank 0 at operation 0, recorded was"):
        graphs.replay(inputs, (1, 1, 1))
    layer.chain = 0
    inputs, wanted = random_step((1, 1, 1))
    require_right(graphs.replay(inputs, (1, 1, 1)), wanted)


def test_a_step_that_stops_early_is_caught(layer: Layer) -> None:
    steps: list[Any] = [layer]
    graphs = DecodeGraphs(layer.buffers, lambda i, n: steps[0](i, n), group_inputs, (2,))
    steps[0] = lambda inputs, _: [{"out": torch.zeros(2, CONFIG.hidden)} for _ in inputs]
    with pytest.raises(CaptureError, match="came to the end at operation 0"):
        graphs.replay(None, (0, 0, 0))


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((2, 9), r"bucket 9 is outside 1\.\.8 \(max_tokens\)"),
        ((), "no buckets"),
        ((4, 2), "ascend"),
        (8, "buckets is 8; give a sequence"),
    ],
)
def test_buckets_that_do_not_fit_are_refused_before_the_step_runs(
    layer: Layer, buckets: Any, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        DecodeGraphs(layer.buffers, layer, group_inputs, buckets)
    assert layer.runs == 0


def test_buckets_are_held_to_the_buffers_limit_not_their_own(layer: Layer) -> None:
    with pytest.raises(ShapeError, match=r"bucket 16 is outside 1\.\.8"):
        DecodeGraphs(layer.buffers, layer, group_inputs, Buckets((2, 16), 16))


def wrong_rows(rows: int) -> list[Tensors]:
    return [{**one, "x": one["x"][:-1]} for one in group_inputs(rows)]


@pytest.mark.parametrize(
    ("make_inputs", "message"),
    [
        (wrong_rows, "'x' with 7 rows"),
        (lambda rows: group_inputs(rows)[:2], "for 2 ranks"),
        (lambda rows: [{"x": torch.empty(rows, device="meta")}] * RANKS, "on meta"),
    ],
)
def test_static_inputs_of_another_shape_or_place_are_refused(
    layer: Layer, make_inputs: Any, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        DecodeGraphs(layer.buffers, layer, make_inputs, (2, 8))
    assert layer.runs == 0


@pytest.mark.parametrize(
    ("change", "counts", "message"),
    [
        ({}, (1, 1, 9), "9, above the largest bucket 8"),
        ({}, (1, 1), "num_tokens has 2 entries"),
        ({"idx": None}, (1, 1, 1), "captured with"),
        ({"x": torch.zeros(4, 64, dtype=torch.bfloat16)}, (1, 1, 1), r"\[4, 64\]"),
        ({"x": torch.zeros(4, 128)}, (1, 1, 1), "torch.float32"),
        ({}, (5, 1, 1), "at least num_tokens rows"),
    ],
)
def test_bad_inputs_of_a_replay_are_refused_before_the_step_runs(
    layer: Layer, change: dict[str, torch.Tensor | None], counts: tuple[int, ...], message: str
) -> None:
    graphs = capture(layer)
    runs = layer.runs
    one = {name: t for name, t in (empty_inputs(4) | change).items() if t is not None}
    with pytest.raises(ShapeError, match=message):
        graphs.replay([one] * RANKS, counts)
    assert layer.runs == runs


def test_a_bucket_that_was_not_captured_is_named(layer: Layer) -> None:
    with pytest.raises(CaptureError, match=r"bucket 3 was not captured"):
        capture(layer).replay_bucket(3)


def test_mixed_sizes_must_be_buckets(layer: Layer) -> None:
    with pytest.raises(ShapeError, match=r"mixed sizes \(2, 3, 2\)"):
        capture(layer, mixed=[(2, 3, 2)])
