"""Tuning of the normal operations, in DeepEP's form. Only the number of SMs has an effect here."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from ep_runtime import env
from ep_runtime.errors import ConfigError
from ep_runtime.native import _C

ALIGNMENT = 128  # bytes: DeepEP users round and check buffer sizes to this
_DISPATCH_CHUNKS = (24, 256, 6, 128)
_COMBINE_CHUNKS = (10, 256, 6, 128)
_METADATA_BYTES = 32 * 12 + 64  # of a row: up to 32 expert numbers (8) and weights (4), and counts
HINT_TOKENS = 4096  # tokens per rank that the size hints are for
NODE_RANKS = 8  # of a node, where nobody says otherwise


@dataclass(frozen=True, slots=True)
class Config:
    """DeepEP's tuning of a normal dispatch or combine.

    num_sms  SMs that the kernel may use; calls take a positive even number. The chunk sizes
             describe ring queues, which this implementation does not have: they are checked and
             kept, no more.
    Raises ConfigError where DeepEP asserts.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = plain(getattr(self, name))
            least = 0 if name == "num_sms" else 1  # calls that use it ask for more
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={value!r}: it must be an integer from {least} on")
            object.__setattr__(self, name, value)
        nvl_send, nvl_recv = (
            self.num_max_nvl_chunked_send_tokens,
            self.num_max_nvl_chunked_recv_tokens,
        )
        if nvl_send >= nvl_recv:
            raise ConfigError(
                f"num_max_nvl_chunked_send_tokens={nvl_send}: it must be below"
                f" num_max_nvl_chunked_recv_tokens={nvl_recv}"
            )
        rdma_send, rdma_recv = (
            self.num_max_rdma_chunked_send_tokens,
            self.num_max_rdma_chunked_recv_tokens,
        )
        if rdma_send > rdma_recv // 2:
            raise ConfigError(
                f"num_max_rdma_chunked_send_tokens={rdma_send}: it must be at most half of"
                f" num_max_rdma_chunked_recv_tokens={rdma_recv}"
            )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as num_nvl_bytes: room for two dispatches of 4096 tokens from every rank.

        hidden_bytes  of one row. Dispatches of more tokens work too: see Buffer.
        """
        hidden_bytes, num_ranks = _check_hint(hidden_bytes, num_ranks)
        row = hidden_bytes + _METADATA_BYTES
        # The constructor takes no more than 2**31 - 1 where num_rdma_bytes is given as well.
        wanted = min(2 * num_ranks * HINT_TOKENS * row, 2**31 - ALIGNMENT)
        return -(-wanted // ALIGNMENT) * ALIGNMENT

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of symmetric memory that normal operations take where rows cross a network: of
        dispatches of 4096 tokens from every rank. 0 for the ranks of one node.

        A node has EP_RANKS_PER_NODE ranks, or else DeepEP's 8.
        """
        hidden_bytes, num_ranks = _check_hint(hidden_bytes, num_ranks)
        per_node = env.read().ranks_per_node or NODE_RANKS
        nodes = -(-num_ranks // per_node)
        if nodes == 1:
            return 0
        limits = _C.limits()
        wanted = _C.wire_region(
            nodes,
            per_node,
            limits["max_experts"],
            HINT_TOKENS,
            -(-hidden_bytes // 2),
            limits["max_topk"],
        )["bytes"]
        return -(-wanted // ALIGNMENT) * ALIGNMENT


def plain(value: Any) -> Any:
    """An integer of another type, such as numpy's, as an int; anything else as it is."""
    # No tensor: to read one waits for the device. No bool: where a number is asked for, a mistake.
    if type(value) is int or isinstance(value, bool | torch.Tensor):
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        return value


def check_num_sms(num_sms: object) -> int:
    """`num_sms` as an int, if DeepEP's kernels would take it."""
    num_sms = plain(num_sms)
    if type(num_sms) is not int or num_sms < 2 or num_sms % 2:
        raise ConfigError(f"num_sms={num_sms!r}: it must be a positive even integer")
    return num_sms


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """What Buffer.get_dispatch_config returns."""
    _check_ranks(num_ranks)
    return Config(num_sms, *_DISPATCH_CHUNKS)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """What Buffer.get_combine_config returns."""
    _check_ranks(num_ranks)
    return Config(num_sms, *_COMBINE_CHUNKS)


def _check_ranks(num_ranks: object) -> int:
    num_ranks = plain(num_ranks)
    if type(num_ranks) is not int or num_ranks < 1:
        raise ConfigError(f"num_ranks={num_ranks!r}: it must be a positive integer")
    return num_ranks


def _check_hint(hidden_bytes: object, num_ranks: object) -> tuple[int, int]:
    hidden_bytes = plain(hidden_bytes)
    if type(hidden_bytes) is not int or hidden_bytes < 1:
        raise ConfigError(f"hidden_bytes={hidden_bytes!r}: it must be the bytes of a row")
    return hidden_bytes, _check_ranks(num_ranks)
