"""Names, arguments, defaults and values of DeepEP's interface that take no communication."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deep_ep_ranks import Rank, RankPool
from low_latency_cases import Format, combine, dispatch, open_buffer
from traffic import Sizes

from ep_runtime.errors import ConfigError, SequenceError, ShapeError
from ep_runtime.integrations.deep_ep import Buffer, Config, EventHandle, EventOverlap, core
from ep_runtime.normal.tuned import TunedSms, write_tuned

NONE, FALSE = "=None", "=False"
ASYNC = f"previous_event{NONE} async_finish{FALSE} allocate_on_comm_stream{FALSE}"
# The signatures that DeepEP's users call by position or by name.
SIGNATURES = {
    "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False"
    " num_qps_per_rank=24 allow_nvlink_for_low_latency_mode=True allow_mnnvl=False"
    " use_fabric=False explicitly_destroy=False enable_shrink=False comm=None",
    "destroy": "",
    "is_sm90_compiled": "",
    "set_num_sms": "new_num_sms",
    "capture": "",
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank hidden num_ranks"
    " num_experts",
    "get_comm_stream": "",
    "get_local_buffer_tensor": "dtype size=None offset=0 use_rdma_buffer=False",
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "get_dispatch_layout": f"topk_idx num_experts {ASYNC}",
    "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None"
    " is_token_in_rank=None num_tokens_per_expert=None topk_idx=None topk_weights=None"
    f" expert_alignment=1 num_worst_tokens=0 config=None {ASYNC}",
    "combine": f"x handle topk_weights=None bias=None config=None {ASYNC}",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
    "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts"
    " cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None use_fp8=True"
    " round_scale=False use_ue8m0=False async_finish=False return_recv_hook=False",
    "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False"
    " async_finish=False return_recv_hook=False out=None combine_wait_recv_cost_stats=None",
    "get_next_low_latency_combine_buffer": "handle",
    "low_latency_update_mask_buffer": "rank_to_mask mask=False",
    "low_latency_query_mask_buffer": "mask_status",
    "low_latency_clean_mask_buffer": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(Buffer, name)).parameters.values()
    told = [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.name != "self"
    ]
    assert " ".join(told) == SIGNATURES[name]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def test_config_has_deep_ep_defaults_and_limits() -> None:
    config = Config()
    assert [getattr(config, name) for name in Config.__slots__] == [20, 6, 256, 6, 256]
    assert Config(24, 8, 256, 16, 128).num_sms == 24
    assert [Config(number).num_sms for number in (0, 21)] == [0, 21]  # as DeepEP takes them
    for bad in ((-2,), (20, 0), (20, 256, 256), (20, 6, 256, 65, 128), (20.0,)):
        with pytest.raises(ConfigError):
            Config(*bad)
    row = 7168 * 2
    hint = config.get_nvl_buffer_size_hint(row, 8)
    assert hint % 128 == 0
    assert 2 * 4096 * row <= hint < 2**31
    assert hint > config.get_nvl_buffer_size_hint(row // 2, 2)
    assert config.get_rdma_buffer_size_hint(row, 8) == 0
    for bad_hint in ((0, 8), (row, 0)):
        with pytest.raises(ConfigError):
            config.get_nvl_buffer_size_hint(*bad_hint)


def test_the_number_of_sms_is_set_for_all_buffers() -> None:
    assert Buffer.num_sms == 20
    try:
        Buffer.set_num_sms(64)
        assert Buffer.num_sms == 64
        for ranks in (2, 3, 4, 8, 72):
            assert Buffer.get_dispatch_config(ranks).num_sms == 64
            assert Buffer.get_combine_config(ranks).num_sms == 64
        for bad in (7, 0, -2):
            with pytest.raises(ConfigError, match=str(bad)):
                Buffer.set_num_sms(bad)
    finally:
        Buffer.set_num_sms(20)


def test_measured_numbers_of_sms_are_used_unless_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EP_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "a GPU")
    monkeypatch.setattr(Buffer, "_sms_chosen", False)
    core._tuned.cache_clear()
    write_tuned(tmp_path / "tuned.json", "a GPU", 2, TunedSms(13, 32))
    assert Buffer.get_dispatch_config(2).num_sms == 12
    assert Buffer.get_combine_config(2).num_sms == 32
    assert Buffer.get_dispatch_config(4).num_sms == Buffer.num_sms == 20
    monkeypatch.setattr(Buffer, "num_sms", 10)  # some programs assign it
    assert Buffer.get_dispatch_config(2).num_sms == 10
    core._tuned.cache_clear()


def test_low_latency_size_hint_is_the_memory_that_is_taken() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert hint % 128 == 0
    # At least the rows of both directions, twice; far below a slot for each (expert, token).
    rows = 8 * 128 * 7168 * 2
    assert 4 * rows <= hint < 8 * rows
    with pytest.raises(ConfigError, match="250"):
        Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 250)


def test_events_without_a_gpu() -> None:
    with pytest.raises(SequenceError, match="async_finish"):
        EventOverlap().current_stream_wait()
    with EventOverlap() as nothing:
        assert nothing.event is None
    handle = EventHandle()
    handle.current_stream_wait()
    kept = torch.zeros(1)
    with EventOverlap(handle, (kept,)) as overlap:
        assert overlap.extra_tensors == (kept,)
    assert Buffer.capture().event is not None


class FakeComm:
    """What is used of mpi4py's communicator, over the test's own group."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank.rank

    def Get_size(self) -> int:  # noqa: N802
        return self.rank.num_ranks

    def bcast(self, obj: Any, root: int = 0) -> Any:
        box = [obj]
        dist.broadcast_object_list(box, src=root, group=self.rank.group)
        return box[0]

    def allgather(self, obj: Any) -> list[Any]:
        told: list[Any] = [None] * self.rank.num_ranks
        dist.all_gather_object(told, obj, group=self.rank.group)
        return told


SIZES = Sizes(num_experts=8, topk=2, hidden=512, max_tokens=8)


def over_mpi(rank: Rank, seed: int) -> None:
    buffer = Buffer(None, low_latency_mode=True, explicitly_destroy=True, comm=FakeComm(rank))
    assert (buffer.rank, buffer.group_size) == (rank.rank, rank.num_ranks)
    combine(rank, buffer, dispatch(rank, buffer, SIZES, seed, Format(), "plain"))
    buffer.destroy()


def test_an_mpi_communicator_serves_as_group(pool: RankPool, seed: int) -> None:
    pool.run(over_mpi, seed)


def sub_groups(rank: Rank, seed: int) -> None:
    """Ranks 0, 1 and ranks 2, 3 work apart; ranks of a group count from 0."""
    halves = [dist.new_group(list(range(h, h + 2))) for h in (0, 2)]
    half = Rank(rank.rank % 2, 2, rank.device, halves[rank.rank // 2])
    buffer = open_buffer(half, SIZES)
    assert (buffer.rank, buffer.group_size) == (half.rank, 2)
    for turn in range(2):
        sent = dispatch(half, buffer, SIZES, seed + rank.rank // 2 + turn, Format(), "hook")
        combine(half, buffer, sent)
    buffer.destroy()


def test_groups_that_are_part_of_the_world(pool: RankPool, seed: int) -> None:
    if pool.num_ranks < 4:
        pytest.skip("two groups of two take four ranks")
    pool.run(sub_groups, seed)


def attributes(rank: Rank) -> None:
    buffer = Buffer(rank.group, 1024, 512, True, 8, explicitly_destroy=True)
    assert buffer.group is rank.group
    assert (buffer.rank, buffer.group_size) == (rank.rank, rank.num_ranks)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1024, 512)
    assert buffer.low_latency_mode
    assert buffer.explicitly_destroy
    assert not buffer.enable_shrink
    assert isinstance(Buffer.is_sm90_compiled(), bool)
    assert buffer.get_comm_stream() is not None
    assert buffer.get_local_buffer_tensor(torch.float32).shape == (256,)
    assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).shape == (512,)
    view = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((4, 8)), 64)
    assert view.shape == (4, 8)
    view.fill_(1)
    everything = buffer.get_local_buffer_tensor(torch.bfloat16)
    assert int(everything.count_nonzero()) == 32
    assert int(everything[32:64].count_nonzero()) == 32
    for arguments in ((torch.float32, None, 2), (torch.float32, None, 2048)):
        with pytest.raises(ShapeError, match="offset"):
            buffer.get_local_buffer_tensor(*arguments)
    with pytest.raises(ShapeError, match="size"):
        buffer.get_local_buffer_tensor(torch.float32, torch.Size((257,)))
    buffer.destroy()
    buffer.destroy()
    with pytest.raises(SequenceError, match="destroyed"):
        buffer.get_local_buffer_tensor(torch.int8)


def test_attributes_and_local_memory(pool: RankPool) -> None:
    pool.run(attributes)
