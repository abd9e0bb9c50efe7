"""DeepEP's low-latency calls on ep_runtime.Buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ep_runtime import env
from ep_runtime.buffer import Buffer as EpBuffer
from ep_runtime.config import EpConfig
from ep_runtime.errors import ConfigError, SequenceError, ShapeError
from ep_runtime.handles import Received
from ep_runtime.integrations.deep_ep.config import plain
from ep_runtime.integrations.deep_ep.events import EventOverlap
from ep_runtime.integrations.deep_ep.low_latency_handle import (
    Engine,
    LowLatencyHandle,
    engine_of,
    routing_of,
    zero_copy_rows,
)
from ep_runtime.integrations.deep_ep.mask import RankMask
from ep_runtime.integrations.deep_ep.place import Place
from ep_runtime.layout import layout_of
from ep_runtime.normal.validate import require_tensor
from ep_runtime.pending import Pending

Hook = Callable[[], None]
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

MAX_TOPK = 32  # size hints are for the widest routing, which they are not told
HINT_ALIGNMENT = 128


class LowLatency:
    """All low-latency calls of one deep_ep Buffer. Every call is collective."""

    def __init__(self, place: Place, mask: RankMask) -> None:
        self._place = place
        self._mask = mask
        self._even = env.read().even_tokens
        # Kept for ever: captured graphs hold their addresses. Some tens of megabytes each.
        self._engines: dict[tuple[int, int, int, int], Engine] = {}

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        *,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        cumulative: torch.Tensor | None,
        wait_ns: torch.Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """See Buffer.low_latency_dispatch."""
        _check_modes(async_finish, return_recv_hook)
        if use_ue8m0 and not round_scale:
            raise ConfigError(
                "use_ue8m0=True with round_scale=False: scales can be kept as exponents only where"
                " they are powers of two; pass both as True"
            )
        engine = self._engine(x, topk_idx, max_tokens, num_experts)
        x = _values(x)
        buffer = engine.buffer
        dispatch_format: Literal["bf16", "fp8"] = "fp8" if use_fp8 else "bf16"
        scale_format: Literal["float32", "ue8m0"] = "float32"
        if use_ue8m0 and use_fp8:  # without FP8 there are no scales to keep
            scale_format = "ue8m0"
        into = buffer.new_receive(
            dispatch_format=dispatch_format,
            scale_format=scale_format,
            column_major_scales=True,
        )
        received = into.received
        handle = LowLatencyHandle.make(received, engine)
        options: dict[str, Any] = {
            "out": into,
            "round_scale": round_scale,
            "cumulative_recv_count": cumulative,
            "wait_ns": wait_ns,
            "expected_tokens": x.shape[0] if self._even else None,
        }
        hook: Hook | None = None
        if return_recv_hook:
            pending = self._send(lambda: buffer.dispatch(x, topk_idx, **options))

            def hook() -> None:
                with self._place.comm.here():
                    handle.routing = pending.wait().handle

            event = EventOverlap()
        else:
            done, event = self._place.run(
                lambda: buffer.dispatch_fused(x, topk_idx, **options), async_finish=async_finish
            )
            handle.routing = done.handle
        rows: Rows = received.x if received.scales is None else (received.x, received.scales)
        if async_finish:
            self._keep(event, x, topk_idx, cumulative, wait_ns, *_tensors(received))
        return rows, received.recv_count, handle, event, hook

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        *,
        use_logfmt: bool,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: torch.Tensor | None,
        wait_ns: torch.Tensor | None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """See Buffer.low_latency_combine."""
        _check_modes(async_finish, return_recv_hook)
        if use_logfmt and zero_copy:
            raise ConfigError(
                "use_logfmt=True with zero_copy=True: rows in place cannot be encoded; pass one"
            )
        engine, routing = self._own(handle), routing_of(handle)
        require_tensor("topk_idx", topk_idx)
        require_tensor("topk_weights", topk_weights)
        if topk_idx.shape != topk_weights.shape:
            raise ShapeError(
                f"topk_idx is {list(topk_idx.shape)}, topk_weights is {list(topk_weights.shape)}:"
                " pass the topk_idx of the dispatch and a weight for each of its entries"
            )
        rows = zero_copy_rows(engine, x) if zero_copy else _values(x)
        buffer = engine.buffer
        hook: Hook | None = None
        if out is None:
            out = torch.empty(
                (topk_idx.shape[0], buffer.config.hidden),
                dtype=torch.bfloat16,
                device=buffer.device,
            )
        options: dict[str, Any] = {
            "topk_weights": _values(topk_weights),
            "out": _values(out),
            "wait_ns": wait_ns,
            "combine_format": "fp8" if use_logfmt else None,
        }
        if return_recv_hook:
            pending = self._send(lambda: buffer.combine(rows, routing, **options))

            def hook() -> None:
                with self._place.comm.here():
                    pending.wait()

            event = EventOverlap()
        else:
            _, event = self._place.run(
                lambda: buffer.combine_fused(rows, routing, **options), async_finish=async_finish
            )
        if async_finish:
            self._keep(event, rows, topk_weights, out, wait_ns, routing.routing, *handle[:2])
        return out, event, hook

    def next_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """See Buffer.get_next_low_latency_combine_buffer."""
        engine = self._own(handle)
        buffer = engine.buffer
        self._place.comm.join()  # an asynchronous combine may still read it
        if engine.combine_rows is None:
            self._place.refuse_capture(
                "the first get_next_low_latency_combine_buffer()", "call it once"
            )
            config = buffer.config
            shape = (
                config.local_experts(buffer.num_ranks),
                config.recv_rows(buffer.num_ranks),
                config.hidden,
            )
            with torch.inference_mode(False):  # callers write into it in any mode
                engine.combine_rows = torch.zeros(shape, dtype=torch.bfloat16, device=buffer.device)
        return engine.combine_rows

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """See Buffer.clean_low_latency_buffer."""
        _config(plain(num_experts), 1, plain(hidden), plain(max_tokens)).validate_for(
            self._place.world.num_ranks
        )
        resets = self._mask.enabled and not self._place.capturing()
        for engine in self._engines.values():
            (engine.buffer.reset if resets else engine.buffer.check)()

    def close(self) -> None:
        """Give all memory back. Collective."""
        self._mask.forget()
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.buffer.close()

    def _own(self, handle: LowLatencyHandle) -> Engine:
        """The handle's engine. Raises SequenceError if it is none of these (any more)."""
        engine = engine_of(handle)
        if not any(engine is mine for mine in self._engines.values()):
            raise SequenceError(
                "handle was made by another Buffer (or before destroy()): pass it to the one whose"
                " low_latency_dispatch returned it"
            )
        return engine

    # ---- parts ----------------------------------------------------------------------------------

    def _engine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, num_experts: int
    ) -> Engine:
        require_tensor("x", x)
        require_tensor("topk_idx", topk_idx)
        if x.dim() != 2 or topk_idx.dim() != 2:
            raise ShapeError(
                f"x is {list(x.shape)}, topk_idx is {list(topk_idx.shape)}: they must be [T, H] and"
                " [T, K]"
            )
        experts, most = plain(num_experts), plain(max_tokens)
        key = (experts, topk_idx.shape[1], x.shape[1], most)
        engine = self._engines.get(key)
        if engine is None or type(experts) is not int or type(most) is not int:  # 8.0 finds 8
            engine = self._engines[key] = self._build(x, _config(*key))
        return engine

    def _build(self, x: torch.Tensor, config: EpConfig) -> Engine:
        """Collective: all ranks come with the same sizes, or all raise."""
        place = self._place
        device = place.on(x).device
        place.refuse_capture(
            f"the first low-latency call with {config}", "make an eager call with these sizes"
        )
        backend: Literal["cuda", "host"] = "cuda" if device.type == "cuda" else "host"
        on = device if backend == "cuda" else None
        buffer = EpBuffer(config, place.world, backend, device=on)
        self._mask.adopt(buffer)
        return Engine(buffer)

    def _send(self, step: Callable[[], Pending[Any]]) -> Pending[Any]:
        with self._place.comm.here():
            return step()

    def _keep(self, event: EventOverlap, *tensors: torch.Tensor | None) -> None:
        """Memory that the communication stream uses must not be given to others meanwhile."""
        present = [t for t in tensors if t is not None]
        event.extra_tensors = present
        self._place.comm.lend(present)


def size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of the symmetric memory of one rank, for the widest routing."""
    config = _config(plain(num_experts), MAX_TOPK, plain(hidden), plain(max_tokens))
    layout = layout_of(config, plain(num_ranks))
    return -(-layout.sizes.heap // HINT_ALIGNMENT) * HINT_ALIGNMENT


def _config(num_experts: int, topk: int, hidden: int, max_tokens: int) -> EpConfig:
    return EpConfig(
        num_experts=num_experts,
        topk=topk,
        hidden=hidden,
        max_tokens=max_tokens,
        num_chains=1,
        dispatch_format="bf16",
    )


def _check_modes(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise SequenceError(
            "async_finish=True with return_recv_hook=True: a hook runs on the stream that is"
            " current when it is called; choose one"
        )


def _tensors(received: Received) -> list[torch.Tensor | None]:
    return [
        received.x,
        received.scales,
        received.recv_count,
        received.num_messages,
        received.source_token,
        received.layout_range,
        received.handle.routing,
    ]


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Low-latency calls cut gradients, and DeepEP's say nothing of it."""
    return tensor.detach() if isinstance(tensor, torch.Tensor) and tensor.requires_grad else tensor
