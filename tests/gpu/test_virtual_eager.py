"""What is particular to a GPU rank: no hidden synchronisation, streams, and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from groups import VirtualGroup
from support import (
    check_combined,
    check_received,
    new_rng,
    random_input,
    random_inputs,
    random_outputs,
)

from ep_runtime import (
    BuildError,
    EpConfig,
    PeerTimeout,
    SequenceError,
    ShapeError,
    reference,
    virtual_ranks,
)
from ep_runtime.reference import RankInput

pytestmark = pytest.mark.gpu

CONFIG = EpConfig(num_experts=16, topk=4, hidden=512, max_tokens=24)
RANKS = 4


@pytest.fixture
def group() -> Iterator[VirtualGroup]:
    made = VirtualGroup(CONFIG, RANKS, "cuda", (0,))
    yield made
    made.close()


def on_gpu(rng: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    one = random_input(rng, CONFIG, rows)
    return one.x.cuda(), one.topk_idx.cuda(), one.topk_weights.cuda()


def test_operations_never_synchronise(group: VirtualGroup) -> None:
    rng = new_rng()
    buffers = [driver.buffer for driver in group.drivers]
    arguments = [on_gpu(rng, 8) for _ in buffers]
    y = torch.zeros(4, RANKS * 24, 512, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            received = [
                p.wait() for p in [b.dispatch(*a) for b, a in zip(buffers, arguments, strict=True)]
            ]
            back = [b.combine(y, r.handle) for b, r in zip(buffers, received, strict=True)]
            for pending in back:
                pending.wait()
            for buffer in buffers:
                buffer.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    group.all("check")


def test_each_rank_may_use_a_stream_of_its_own(group: VirtualGroup) -> None:
    rng = new_rng()
    streams = [torch.cuda.Stream() for _ in range(RANKS)]
    for _ in range(5):
        inputs = random_inputs(rng, CONFIG, RANKS)
        expected = reference.dispatch(CONFIG, inputs)
        torch.cuda.synchronize()
        for rank, driver in enumerate(group.drivers):
            with torch.cuda.stream(streams[rank]):
                driver.dispatch(inputs[rank])
        got = []
        for rank in reversed(range(RANKS)):
            with torch.cuda.stream(streams[rank]):
                got.insert(0, group.drivers[rank].receive())
        check_received(got, expected)
        outputs = random_outputs(rng, expected)
        check_combined(group.combine(outputs), CONFIG, inputs, outputs)


def test_work_between_send_and_wait_is_not_disturbed(group: VirtualGroup) -> None:
    """The hook: a large GEMM runs between the halves, on the same stream."""
    rng = new_rng()
    a = torch.randn(2048, 2048, device="cuda")
    inputs = random_inputs(rng, CONFIG, RANKS)
    for rank, driver in enumerate(group.drivers):
        driver.dispatch(inputs[rank])
    product = a @ a
    expected = reference.dispatch(CONFIG, inputs)
    check_received(group.all("receive", 0), expected)
    assert torch.allclose(product, a @ a)
    outputs = random_outputs(rng, expected)
    check_combined(group.combine(outputs), CONFIG, inputs, outputs)


def test_context_survives_a_timeout(group: VirtualGroup) -> None:
    rng = new_rng()
    group.all("query", "set_time_budget", 0.2)
    group.drivers[0].dispatch(random_input(rng, CONFIG, 4))
    with pytest.raises(PeerTimeout) as caught:
        group.drivers[0].receive_alone()
    assert caught.value.rank == 0
    assert caught.value.peer != 0
    assert float(torch.ones(100, device="cuda").sum()) == 100
    group.all("query", "reset")
    inputs = random_inputs(rng, CONFIG, RANKS)
    check_received(group.dispatch(inputs), reference.dispatch(CONFIG, inputs))


def test_tensors_of_another_device_are_refused(group: VirtualGroup) -> None:
    x, idx, weights = on_gpu(new_rng(), 4)
    buffer = group.drivers[0].buffer
    for wrong in ((x.cpu(), idx, weights), (x, idx.cpu(), weights), (x, idx, weights.cpu())):
        with pytest.raises(ShapeError, match=r"device is cpu, it must be cuda:0"):
            buffer.dispatch(*wrong)
    with pytest.raises(ShapeError, match=r"num_tokens\.device"):
        buffer.dispatch(x, idx, weights, num_tokens=torch.tensor(3, dtype=torch.int32))


def test_fused_operations_are_refused_where_ranks_share_the_gpu(group: VirtualGroup) -> None:
    with pytest.raises(SequenceError, match="dispatch_fused on virtual rank 0"):
        group.drivers[0].buffer.dispatch_fused(*on_gpu(new_rng(), 4))


def test_single_rank_may_fuse() -> None:
    rng = new_rng()
    group = VirtualGroup(CONFIG, 1, "cuda", (0,))
    for _ in range(3):
        inputs = random_inputs(rng, CONFIG, 1, padded=True)
        expected = reference.dispatch(CONFIG, inputs)
        check_received(group.dispatch_fused(inputs), expected)
        outputs = random_outputs(rng, expected)
        check_combined(group.combine_fused(outputs), CONFIG, inputs, outputs)
    group.close()


@pytest.mark.parametrize("max_tokens", [255, 512], ids=["usual kernels", "kernels for many"])
def test_scales_are_quotients_for_every_bf16(max_tokens: int) -> None:
    """Groups of 128 channels, as many as BF16 has magnitudes; the kernels divide by multiplying."""
    largest = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).view(255, 128, 1)
    x = (largest * torch.rand(255, 128, 128, generator=new_rng())).bfloat16()
    x[:, :, 77:78] = -largest
    config = EpConfig(num_experts=1, topk=1, hidden=128 * 128, max_tokens=max_tokens)
    inputs = [RankInput(x.view(255, -1), torch.zeros(255, 1).long(), torch.ones(255, 1))]
    group = VirtualGroup(config, 1, "cuda", (0,))
    check_received(group.dispatch(inputs), reference.dispatch(config, inputs))
    group.close()


def test_a_gpu_that_is_not_there_is_named() -> None:
    count = torch.cuda.device_count()
    with pytest.raises((BuildError, ValueError), match=f"device={count}.*{count} GPUs"):
        virtual_ranks(CONFIG, 2, "cuda", [count])


def test_stats_region_is_what_stats_reads(group: VirtualGroup) -> None:
    """A reset node zeroes this region: then stats() starts again from nothing."""
    from ep_runtime import _C

    rng = new_rng()
    inputs = [random_input(rng, CONFIG, 6) for _ in range(RANKS)]
    group.dispatch(inputs, chain=1)
    buffer = group.drivers[0].buffer
    assert buffer.stats(1).rows_received > 0
    address, num_bytes = buffer.stats_region(1)
    _C.cuda_fill_zero(address, num_bytes, 0)
    assert buffer.stats(1).rows_received == 0
    outputs = random_outputs(rng, reference.dispatch(CONFIG, inputs))
    check_combined(group.combine(outputs, chain=1), CONFIG, inputs, outputs)
