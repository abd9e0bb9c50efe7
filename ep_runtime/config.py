"""What every rank of a group must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from ep_runtime import __version__
from ep_runtime.errors import ConfigError
from ep_runtime.native import _C

DispatchFormat = Literal["bf16", "fp8", "opaque"]
ScaleFormat = Literal["float32", "ue8m0"]
CombineFormat = Literal["bf16", "fp8"]
RecvFormat = Literal["batched", "contiguous", "compact"]

MAX_ALIGNMENT = 1024
ROW_BYTES_MULTIPLE = 16  # rows move as 16-byte vectors


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{name}={value!r}: it must be an integer from {low} to {high};"
            f" build the EpConfig with a {name} in that range"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: it must be one of {', '.join(choices)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EpConfig:
    """Sizes and formats of an expert-parallel group. Checked when built; raises ConfigError.

    num_experts         routed experts over all ranks; a multiple of the number of ranks
    topk                entries per token in topk_idx
    hidden              channels of a row, a multiple of 128
    max_tokens          most tokens that one rank dispatches at once
    num_chains          independent micro-batches in flight
    dispatch_format     rows on the wire: "bf16" (single operations may then choose "fp8"), "fp8"
                        (e4m3, a scale per 128 channels), or "opaque": rows that the caller has
                        quantised, moved as they are with their scales (MXFP8, NVFP4, ...)
    scale_format        how FP8 scales are received: "float32", or "ue8m0" (exponent bytes, four to
                        an int32; implies round_scale)
    round_scale         FP8 scales are powers of two
    combine_format      what a rank's sum of a token's rows travels home as, and is rounded to:
                        "bf16" (single combines may then choose "fp8"), or "fp8" (e4m3, a float32
                        scale per 128 channels), which takes half the bytes and half the inbox
    opaque_row_bytes    bytes of an opaque row, a multiple of 16
    opaque_scale_words  4-byte words of scales that come with an opaque row
    recv_format         how received rows lie: see `Received`
    alignment           "contiguous" only: the first row of each expert is a multiple of it
    """

    num_experts: int
    topk: int
    hidden: int
    max_tokens: int
    num_chains: int = 2
    dispatch_format: DispatchFormat = "fp8"
    scale_format: ScaleFormat = "float32"
    round_scale: bool = False
    opaque_row_bytes: int = 0
    opaque_scale_words: int = 0
    combine_format: CombineFormat = "bf16"
    recv_format: RecvFormat = "batched"
    alignment: int = 1

    def __post_init__(self) -> None:
        limits = _C.limits()
        _check_int("num_experts", self.num_experts, 1, limits["max_experts"])
        _check_int("topk", self.topk, 1, limits["max_topk"])
        _check_int("max_tokens", self.max_tokens, 1, limits["max_tokens"])
        _check_int("num_chains", self.num_chains, 1, limits["max_chains"])
        _check_int("alignment", self.alignment, 1, MAX_ALIGNMENT)
        multiple = limits["hidden_multiple"]
        _check_int("hidden", self.hidden, multiple, limits["max_hidden"])
        if self.hidden % multiple:
            raise ConfigError(
                f"hidden={self.hidden}: it must be a multiple of {multiple}; pad the rows to"
                f" {-(-self.hidden // multiple) * multiple} channels"
            )
        _check_choice("dispatch_format", self.dispatch_format, get_args(DispatchFormat))
        _check_choice("scale_format", self.scale_format, get_args(ScaleFormat))
        _check_choice("combine_format", self.combine_format, get_args(CombineFormat))
        _check_choice("recv_format", self.recv_format, get_args(RecvFormat))
        if type(self.round_scale) is not bool:
            raise ConfigError(f"round_scale={self.round_scale!r}: it must be True or False")
        self._check_opaque()
        if self.alignment != 1 and self.recv_format != "contiguous":
            raise ConfigError(
                f"alignment={self.alignment} with recv_format={self.recv_format!r}: only"
                " 'contiguous' aligns experts; leave alignment at 1 or choose 'contiguous'"
            )

    def _check_opaque(self) -> None:
        """Sizes of opaque rows: there, or absent."""
        if self.dispatch_format != "opaque":
            for name in ("opaque_row_bytes", "opaque_scale_words"):
                if getattr(self, name) != 0:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} with dispatch_format="
                        f"{self.dispatch_format!r}: only 'opaque' has it; leave it at 0"
                    )
            return
        most = 2 * _C.limits()["max_hidden"]
        _check_int("opaque_row_bytes", self.opaque_row_bytes, ROW_BYTES_MULTIPLE, most)
        _check_int("opaque_scale_words", self.opaque_scale_words, 0, most // 8)
        if self.opaque_row_bytes % ROW_BYTES_MULTIPLE:
            raise ConfigError(
                f"opaque_row_bytes={self.opaque_row_bytes}: it must be a multiple of"
                f" {ROW_BYTES_MULTIPLE}; pad the rows"
            )
        if self.scale_format != "float32" or self.round_scale:
            raise ConfigError(
                "scale_format and round_scale say how ep_runtime quantises; with"
                " dispatch_format='opaque' the caller does: leave them at their defaults"
            )

    def validate_for(self, num_ranks: int) -> None:
        """Raise ConfigError unless a group of `num_ranks` ranks can use this configuration."""
        _check_int("num_ranks", num_ranks, 1, _C.limits()["max_ranks"])
        if self.num_experts % num_ranks:
            raise ConfigError(
                f"num_experts={self.num_experts} over num_ranks={num_ranks}: every rank holds the"
                f" same number of experts; use a multiple of {num_ranks} (for example"
                f" {-(-self.num_experts // num_ranks) * num_ranks}) or another number of ranks"
            )

    def local_experts(self, num_ranks: int) -> int:
        """Experts that each rank holds; rank r holds r*L .. r*L + L - 1."""
        return self.num_experts // num_ranks

    def recv_rows(self, num_ranks: int) -> int:
        """Rows of `Received.x` (per local expert where the format is "batched")."""
        messages = num_ranks * self.max_tokens
        if self.recv_format != "contiguous":
            return messages
        experts = self.local_experts(num_ranks)
        return messages * min(self.topk, experts) + experts * (self.alignment - 1)

    def fields(self, num_ranks: int) -> dict[str, object]:
        """Everything that ranks must share, by name."""
        return {**asdict(self), "num_ranks": num_ranks, "package": __version__}

    def fingerprint(self, num_ranks: int) -> bytes:
        """32 bytes that two ranks share exactly when they can form a group."""
        text = json.dumps(self.fields(num_ranks), sort_keys=True)
        return hashlib.sha256(text.encode()).digest()
