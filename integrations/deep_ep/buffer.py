"""`deep_ep.Buffer`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ep_runtime.errors import ConfigError, ShapeError
from ep_runtime.integrations.deep_ep.config import Config, check_num_sms, plain
from ep_runtime.integrations.deep_ep.core import Core
from ep_runtime.integrations.deep_ep.events import EventOverlap
from ep_runtime.integrations.deep_ep.low_latency_handle import LowLatencyHandle
from ep_runtime.integrations.deep_ep.normal import Bias, DispatchHandle
from ep_runtime.normal import Layout as DispatchLayout
from ep_runtime.normal import NormalReceived

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Layout = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]
Dispatched = tuple[
    Rows,
    torch.Tensor | None,
    torch.Tensor | None,
    list[int] | None,
    DispatchHandle | None,
    EventOverlap,
]


class Buffer(Core):
    """One rank's end of an expert-parallel group, with the calls of DeepEP's Buffer (V1).

    R ranks, E experts, L = E/R of them here, T tokens of this rank, M max tokens, H hidden, K
    top-k. Tensors are on the GPU, or all on the CPU: then everything runs there, for tests.
    Errors are those of ep_runtime.errors, where DeepEP asserts.
    """

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs that normal operations use from now on (with the default Config); even."""
        # Not of a subclass that this is called on: there is one number, as in DeepEP.
        Buffer.num_sms = check_num_sms(new_num_sms)
        Buffer._sms_chosen = True

    # ---- normal calls ---------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Layout:
        """Count where this rank's tokens go.

        topk_idx  int64 [T, K], contiguous; -1 is no expert
        Returns (num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank, num_tokens_per_expert
        int32 [E], is_token_in_rank bool [T, R], event); num_tokens_per_rdma_rank is int32 [nodes]
        where the group spans nodes, else None. The Buffer's first normal call is collective.
        """
        self._check_open()
        found, per_node, event = self._normal.layout(
            topk_idx, plain(num_experts), (previous_event, async_finish, allocate_on_comm_stream)
        )
        return (
            found.tokens_per_rank,
            per_node,
            found.tokens_per_expert,
            found.is_token_in_rank,
            event,
        )

    def dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Send each token's row once to each rank that owns one of its experts. Collective.

        x                 bf16 [T, H], or (float8_e4m3fn [T, H], scales float32 or int32
                          [T, groups] of any strides)
        handle            of an earlier dispatch: send other rows the same way, without counting
        num_tokens_*, is_token_in_rank  from get_dispatch_layout, where there is no handle
        topk_idx, topk_weights          int64 and float32 [T, K], or None for rows alone
        expert_alignment  the list of counts is rounded up to multiples of it
        num_worst_tokens  0: receive exactly what comes, waiting on the host for its number. Else
                          receive so many rows, without a wait, capturable; unused rows have
                          topk_idx -1 and the list is empty. The same on every rank
        Returns (recv_x, recv_topk_idx, recv_topk_weights, counts per local expert, handle, event),
        rows by source rank, then token; expert numbers local, -1 for other ranks'. With a handle
        all but recv_x and event are None. Where the group spans nodes this is internode_dispatch.
        """
        self._check_open()
        self._check_nodes(num_tokens_per_rdma_rank, handle)
        flow = (previous_event, async_finish, allocate_on_comm_stream)
        config = self.get_dispatch_config(self.group_size) if config is None else config
        num_sms = check_num_sms(config.num_sms)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ShapeError(
                    "topk_idx or topk_weights with a handle: a cached dispatch sends rows alone;"
                    " leave them out"
                )
            received, event = self._normal.dispatch_cached(x, handle, num_sms, flow)
            return _with_scales(received), None, None, None, None, event
        layout = _layout(num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        received, made, event = self._normal.dispatch(
            x,
            layout,
            topk_idx,
            topk_weights,
            plain(expert_alignment),
            plain(num_worst_tokens),
            num_sms,
            flow,
        )
        return (
            _with_scales(received),
            received.topk_idx,
            received.topk_weights,
            received.recv_per_expert,
            made,
            event,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows home and add them up, without weighting them. Collective.

        x             bf16 [N, H], one row per received row
        topk_weights  float32 [N, K]: added up like the rows (for a backward pass), or None
        bias          one or two bf16 [T, H] that start the sum, or None, also for one of the two
        Returns (bf16 [T, H], float32 [T, K] or None, event). FP32 sum in the order of ranks,
        rounded once.
        """
        self._check_open()
        config = self.get_combine_config(self.group_size) if config is None else config
        return self._normal.combine(
            x,
            handle,
            topk_weights,
            bias,
            check_num_sms(config.num_sms),
            (previous_event, async_finish, allocate_on_comm_stream),
        )

    def internode_dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """dispatch() of a group that spans nodes: each token crosses once per node. Collective.

        Arguments and results as of dispatch(); num_tokens_per_rdma_rank is needed where there is
        no handle. The first normal call fixes the most tokens of a rank (rounded up to a power of
        two): make it with the largest. Raises ConfigError where all ranks are one node.
        """
        self._check_spans_nodes("internode_dispatch")
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """combine() of a group that spans nodes: each node's sum crosses as one BF16 row.

        Arguments and results as of combine(). Raises ConfigError where all ranks are one node.
        """
        self._check_spans_nodes("internode_combine")
        return self.combine(
            x,
            handle,
            topk_weights,
            bias,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def _check_spans_nodes(self, call: str) -> None:
        self._check_open()
        if self._normal.ranks_per_node is None:
            raise ConfigError(
                f"{call} on a Buffer whose {self.group_size} ranks are one node (or before its"
                " first normal call, get_dispatch_layout): use dispatch and combine, or declare"
                " nodes by EP_RANKS_PER_NODE"
            )

    def _check_nodes(self, per_node: torch.Tensor | None, handle: DispatchHandle | None) -> None:
        if self._normal.ranks_per_node is not None and handle is None and per_node is None:
            raise ShapeError(
                "dispatch between nodes without num_tokens_per_rdma_rank: pass what"
                " get_dispatch_layout() returned"
            )

    # ---- low-latency calls ----------------------------------------------------------------------

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Check the sizes and recorded faults. There is nothing to clean: signals are numbered.

        With enable_shrink: forget recorded faults and everything in flight, on the ranks that are
        not masked, which all make this call; it synchronises. Not so in a capture.
        """
        self._check_low_latency()
        self._low_latency.clean(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Send each token's row to its experts. Collective; capturable but for the first call.

        x                                   bf16 [T, H], T at most M
        topk_idx                            int64 [T, K], contiguous; -1 is no expert
        num_max_dispatch_tokens_per_rank    M, the same on every rank
        cumulative_local_expert_recv_stats  int32 [L]: received rows are added
        dispatch_wait_recv_cost_stats       int64 [R]: nanoseconds waited for each rank are added
        use_fp8, round_scale, use_ue8m0     quantise to e4m3 per 128 channels; to powers of two;
                                            keep these as exponents, four to an int32. Without
                                            use_fp8 there are none
        return_recv_hook                    send only; the returned hook receives, without holding
                                            an SM in between
        Returns (rows, recv_count int32 [L], handle, event, hook); rows are bf16 [L, R*M, H], or
        (float8_e4m3fn [L, R*M, H], scales float32 [L, R*M, H/128] or int32 [L, R*M, H/512], both
        column-major). Rows behind recv_count are undefined.
        """
        self._check_low_latency()
        return self._low_latency.dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            cumulative=cumulative_local_expert_recv_stats,
            wait_ns=dispatch_wait_recv_cost_stats,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Bring experts' rows home: the weighted sum of each token. Collective; capturable.

        x                             bf16 [L, R*M, H]
        topk_idx, topk_weights        int64 and float32 [T, K] of the dispatch
        handle                        of the dispatch; any number of times
        use_logfmt                    sums travel in a byte per channel: e4m3 with a scale per 128
        zero_copy                     take the rows from get_next_low_latency_combine_buffer()
        out                           bf16 [T, H], contiguous, or None
        combine_wait_recv_cost_stats  int64 [R]: nanoseconds waited for each rank are added
        Returns (bf16 [T, H], event, hook).
        """
        self._check_low_latency()
        return self._low_latency.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            use_logfmt=use_logfmt,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            wait_ns=combine_wait_recv_cost_stats,
        )

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bf16 [L, R*M, H] to write rows into for the next combine with zero_copy=True."""
        self._check_low_latency()
        return self._low_latency.next_combine_buffer(handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask (True) or unmask a rank, in stream order. Needs enable_shrink. Capturable.

        Low-latency calls neither send to nor wait for a masked rank. All ranks that are not masked
        must mask the same; before one is unmasked, all ranks clean_low_latency_buffer().
        """
        self._check_open()
        self._mask.update(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank and 0 for the others into int32 [R]. Capturable."""
        self._check_open()
        self._mask.query(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask all ranks. Capturable; see low_latency_update_mask_buffer()."""
        self._check_open()
        self._mask.clean()


def _layout(
    tokens_per_rank: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
    is_token_in_rank: torch.Tensor | None,
) -> DispatchLayout:
    if tokens_per_rank is None or tokens_per_expert is None or is_token_in_rank is None:
        raise ShapeError(
            "dispatch without a handle takes num_tokens_per_rank, num_tokens_per_expert and"
            " is_token_in_rank: pass what get_dispatch_layout() returned"
        )
    return DispatchLayout(tokens_per_rank, tokens_per_expert, is_token_in_rank)


def _with_scales(received: NormalReceived) -> Rows:
    return received.x if received.scales is None else (received.x, received.scales)
