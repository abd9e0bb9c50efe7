"""What a benchmark of the normal operations runs. Checked when built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ep_runtime.bench.machine import slug
from ep_runtime.bench.options import HELP, WHICH_PEERS, Backend, LowLatencyOptions, Skew
from ep_runtime.errors import ConfigError

FORMATS = ("bf16", "fp8")
TIMINGS = ("graph", "eager")
NORMAL_PEERS = ("nccl-ag-rs", "deep_ep")
NORMAL_HELP = HELP | {
    "formats": f"{HELP['dispatch_formats']} Combine is BF16.",
    "sms": "Most SMs that an operation of ours may use; 0: all that a rank can have.",
    "timings": "graph: worst-case mode, replayed; eager: exact mode, called from Python.",
    "peers": f"{WHICH_PEERS} {', '.join(NORMAL_PEERS)}.",
    "num_experts": HELP["experts"],
    "repeats": "Operations in one graph (or in one eager run).",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalOptions:
    """Sizes, variants and effort of `ep-runtime bench normal`: NORMAL_HELP says what they mean.

    None is as in LowLatencyOptions.
    """

    tokens: tuple[int, ...] = (4096,)
    hidden: int = 7168
    topk: int = 8
    num_experts: int = 256
    formats: tuple[str, ...] = FORMATS
    sms: tuple[int, ...] = (8, 16, 24, 32, 64, 0)
    timings: tuple[str, ...] = TIMINGS
    ranks: int = 0
    share_gpu: bool = False
    skew: Skew = "uniform"
    repeats: int = 10
    replays: int = 20
    peers: tuple[str, ...] = ("auto",)
    backend: Backend = "auto"
    link_gbs: float | None = None
    out: Path | None = Path("benchmarks/results")
    label: str = ""
    plot: bool = False
    commit: str | None = None
    command: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "topk", "num_experts", "repeats", "replays"):
            _at_least(name, getattr(self, name), 1)
        for value in self.sms:
            _at_least("sms", value, 0)
        for value in self.tokens:
            _at_least("tokens", value, 1)
        if self.hidden % 128:
            raise ConfigError(f"hidden={self.hidden}: FP8 scales need a multiple of 128 channels")
        for name, allowed in (
            ("formats", FORMATS),
            ("timings", TIMINGS),
            ("peers", ("auto", "none", *NORMAL_PEERS)),
        ):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} is empty: give at least one value")
            for value in values:
                _one_of(name, value, allowed)
        if not self.tokens or not self.sms:
            raise ConfigError("tokens and sms: give at least one value each")
        _one_of("skew", self.skew, get_args(Skew))
        _one_of("backend", self.backend, get_args(Backend))
        if self.label and not slug(self.label):  # told before anything is measured
            raise ConfigError(
                f"label={self.label!r} has no letter of a-z and no digit; name it otherwise"
            )

    def wants(self, peer: str) -> bool:
        """Is `peer` to be measured (or reported absent)?"""
        return peer in self.peers or "auto" in self.peers

    def session(self) -> LowLatencyOptions:
        """What a session of the benchmarks is opened with."""
        return LowLatencyOptions(
            tokens=self.tokens,
            hidden=self.hidden,
            topk=self.topk,
            experts=(self.num_experts,),
            ranks=self.ranks,
            share_gpu=self.share_gpu,
            skew=self.skew,
            peers=("none",),
            backend=self.backend,
            link_gbs=self.link_gbs,
            out=None,
            commit=self.commit,
            command=self.command,
            seed=self.seed,
        )


def _at_least(name: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"{name}={value!r}: it must be an integer of at least {low}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(allowed)}")
