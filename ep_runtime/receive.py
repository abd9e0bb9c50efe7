"""The tensors that a dispatch fills."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ep_runtime.config import DispatchFormat, EpConfig, ScaleFormat
from ep_runtime.errors import ConfigError
from ep_runtime.handles import Handle, Received, Uses
from ep_runtime.layout import FORMAT, SCALE_GROUP, WIRE, layout_of, shape_of
from ep_runtime.native import _C

SCALES_PER_WORD = {"float32": 1, "ue8m0": 4}
_MOST_SCALE_WORDS = 2**31 - 1


@dataclass(slots=True)
class ReceiveBuffer:
    """Receive tensors and the routing of one dispatch at a time. Made by Buffer.new_receive().

    dispatch_format, scale_format  what the tensors were made for
    """

    dispatch_format: DispatchFormat
    scale_format: ScaleFormat
    received: Received
    _config: EpConfig
    _num_ranks: int
    _target: _C.RecvTarget
    _uses: Uses

    def target(
        self, cumulative_recv_count: torch.Tensor | None, wait_ns: torch.Tensor | None
    ) -> _C.RecvTarget:
        """Where the native receive writes; the one without statistics is made once."""
        if cumulative_recv_count is None and wait_ns is None:
            return self._target
        return _target(self, cumulative_recv_count, wait_ns)

    def new_handle(
        self,
        chain: int,
        num_rows: int,
        num_tokens: torch.Tensor | None,
        expected_tokens: int,
        late_weights: bool,
    ) -> Handle:
        """The handle of the next dispatch into these tensors: good once take() was called."""
        own = self.received.handle
        return replace(
            own,
            chain=chain,
            num_rows=num_rows,
            num_tokens=num_tokens,
            expected_tokens=expected_tokens,
            late_weights=late_weights,
            use=self._uses.count + 1,
            reset=own.resets.count,
        )

    def take(self) -> None:
        """The dispatch is launched now: handles of earlier ones become stale."""
        self._uses.count += 1

    def hand_out(self, handle: Handle) -> Received:
        return replace(self.received, handle=handle)


def _target(
    into: ReceiveBuffer,
    cumulative_recv_count: torch.Tensor | None,
    wait_ns: torch.Tensor | None,
) -> _C.RecvTarget:
    r, config = into.received, into._config
    scales = r.scales
    batched = config.recv_format == "batched"
    strides = (0, 0, 0)
    if scales is not None:
        strides = (scales.stride(0) if batched else 0, scales.stride(-2), scales.stride(-1))
    return _C.RecvTarget(
        shape_of(config, into._num_ranks),
        routing=r.handle.routing.data_ptr(),
        format=FORMAT[config.recv_format],
        wire=WIRE[into.dispatch_format],
        alignment=config.alignment,
        x=r.x.data_ptr(),
        num_rows=r.x.shape[:-1].numel(),
        scales=_address(scales),
        ue8m0=into.scale_format == "ue8m0",
        scale_expert_stride=strides[0],
        scale_row_stride=strides[1],
        scale_group_stride=strides[2],
        recv_count=r.recv_count.data_ptr(),
        expert_offset=_address(r.expert_offset),
        topk_idx=_address(r.topk_idx),
        topk_weights=_address(r.topk_weights),
        num_messages=r.num_messages.data_ptr(),
        source_token=_address(r.source_token),
        layout_range=_address(r.layout_range),
        cumulative_count=_address(cumulative_recv_count),
        wait_ns=_address(wait_ns),
    )


def allocate_receive(
    config: EpConfig,
    num_ranks: int,
    device: torch.device,
    owner: object,
    resets: Uses,
    dispatch_format: DispatchFormat,
    scale_format: ScaleFormat,
    column_major_scales: bool,
    zeroed: bool,
) -> ReceiveBuffer:
    """Receive tensors on `device`, in the configuration's receive format.

    `zeroed` for those made once; others start with whatever the memory held, and no launch.
    """
    make = torch.zeros if zeroed else torch.empty
    experts, rows = config.local_experts(num_ranks), config.recv_rows(num_ranks)
    batched = config.recv_format == "batched"
    lead = (experts, rows) if batched else (rows,)
    compact = config.recv_format == "compact"

    def tensor(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return make(shape, dtype=dtype, device=device) if wanted else None

    uses = Uses()
    routing = make(layout_of(config, num_ranks).routing_bytes, dtype=torch.uint8, device=device)
    width, dtype = _row(config, dispatch_format)
    received = Received(
        x=make((*lead, width), dtype=dtype, device=device),
        scales=_scales(
            config, lead, device, dispatch_format, scale_format, column_major_scales, make
        ),
        recv_count=make(experts, dtype=torch.int32, device=device),
        expert_offset=tensor(config.recv_format == "contiguous", (experts + 1,), torch.int32),
        topk_idx=tensor(compact, (rows, config.topk), torch.int32),
        topk_weights=tensor(compact, (rows, config.topk), torch.float32),
        num_messages=make(num_ranks, dtype=torch.int32, device=device),
        source_token=tensor(batched, (experts, rows), torch.int32),
        layout_range=tensor(batched, (experts, num_ranks), torch.int64),
        handle=Handle(owner, 0, 0, None, 0, False, routing, uses, -1, resets, -1),
    )
    into = ReceiveBuffer(
        dispatch_format=dispatch_format,
        scale_format=scale_format,
        received=received,
        _config=config,
        _num_ranks=num_ranks,
        _target=None,  # type: ignore[arg-type]  # the next line
        _uses=uses,
    )
    into._target = _target(into, None, None)
    return into


def _row(config: EpConfig, dispatch_format: DispatchFormat) -> tuple[int, torch.dtype]:
    """Elements of a received row, and their type."""
    if dispatch_format == "opaque":
        return config.opaque_row_bytes, torch.uint8
    dtype = torch.float8_e4m3fn if dispatch_format == "fp8" else torch.bfloat16
    return config.hidden, dtype


def _scales(
    config: EpConfig,
    lead: tuple[int, ...],
    device: torch.device,
    dispatch_format: DispatchFormat,
    scale_format: ScaleFormat,
    column_major: bool,
    make: Callable[..., torch.Tensor],
) -> torch.Tensor | None:
    if dispatch_format == "bf16" or (dispatch_format == "opaque" and not config.opaque_scale_words):
        return None
    if dispatch_format == "opaque":
        words, dtype = config.opaque_scale_words, torch.int32
    else:
        groups = config.hidden // SCALE_GROUP
        words = -(-groups // SCALES_PER_WORD[scale_format])
        dtype = torch.float32 if scale_format == "float32" else torch.int32
    count = math.prod((*lead, words))
    if count > _MOST_SCALE_WORDS:
        raise ConfigError(
            f"the scales of a dispatch would be {count} words of 4 bytes: kernels address at most"
            f" {_MOST_SCALE_WORDS}; use recv_format='contiguous' or 'compact', fewer max_tokens or"
            " fewer scales a row"
        )
    if column_major:
        shape = (*lead[:-1], words, lead[-1])
        return make(shape, dtype=dtype, device=device).transpose(-1, -2)
    return make((*lead, words), dtype=dtype, device=device)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
