"""What a low-latency benchmark runs. Checked when built; every message says what to change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ep_runtime.errors import ConfigError

Mode = Literal["fused", "split", "hook"]
Skew = Literal["uniform", "zipf", "one-rank", "half-empty"]
Backend = Literal["auto", "cuda", "host"]
DISPATCH_FORMATS = ("fp8", "bf16")
COMBINE_FORMATS = ("bf16", "fp8")
RECV_FORMATS = ("batched", "compact", "contiguous")
PEERS = (
    "nccl-ag-rs",
    "nccl-ag-rs-symm",
    "nccl-a2a",
    "nccl-a2a-equal",
    "torch-symm-a2a",
    "deep_ep",
    "flashinfer",
)
SMALLEST_MAX_TOKENS = 128  # a decode server sizes its buffers once, so small T run in the same one

WHICH_PEERS = "auto (all), none, or of"
BACKEND = "auto: GPUs where there are, else CPU ranks; cuda: GPUs; host: CPU ranks"
# What every option means, for `--help`. The other benchmarks, and commands, take theirs from here.
HELP = {
    "tokens": "Tokens per rank, T.",
    "hidden": "Channels of a row, H; a multiple of 128.",
    "topk": "Experts that a token chooses, K.",
    "experts": "Experts of all ranks together, E; a multiple of the number of ranks.",
    "ranks": "Ranks; 0: torchrun's, else one per GPU, two with one GPU or none.",
    "share_gpu": "Put all ranks (two, if --ranks is 0) on the first of the GPUs.",
    "dispatch_formats": f"How rows travel in dispatch: {', '.join(DISPATCH_FORMATS)}.",
    "combine_formats": f"How our sums travel in combine: {', '.join(COMBINE_FORMATS)};"
    " peers' always as bf16.",
    "recv_formats": "Rows that our dispatch delivers: batched or contiguous (sorted by expert),"
    " compact (one per message).",
    "modes": "fused: one kernel an operation; split: send, then receive; hook: split, with compute"
    " in between.",
    "skew": f"Which experts tokens choose: {', '.join(get_args(Skew))}.",
    "pairs": "Pairs, dispatch -> combine, in one graph.",
    "replays": "How often a graph (or an eager run) is timed.",
    "input_sets": "Input sets that the pairs of a graph rotate through.",
    "peers": f"{WHICH_PEERS} {', '.join(PEERS)}.",
    "no_parts": "Time pairs alone: neither dispatch and combine nor send and receive apart.",
    "backend": f"{BACKEND}.",
    "num_sms": "SMs that our kernels may use; 0: EP_NUM_SMS, or all.",
    "max_tokens": "Most tokens per rank that a buffer takes, M.",
    "compute_us": "Compute between send and receive in mode hook, us.",
    "link_gbs": "What the link carries one way, GB/s.",
    "graph_mixing": "Leave NCCL_GRAPH_MIXING_SUPPORT at NCCL's default of 1.",
    "out": "Folder of the results, or - for none.",
    "label": "Added to the names of the files, to keep runs apart.",
    "plot": "Draw the times too, beside the JSON.",
    "commit": "Commit that the records name.",
    "seed": "Seed of the inputs.",
}
# Defaults that are no value to type.
DEFAULTS_IN_WORDS = {
    "max_tokens": f"the largest T, at least {SMALLEST_MAX_TOKENS}",
    "link_gbs": "measured on this machine",
    "label": "none",
    "commit": "asked of git",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyOptions:
    """Sizes, variants and effort of `ep-runtime bench low-latency`: HELP says what they mean.

    None is the default that DEFAULTS_IN_WORDS says, for `out` that nothing is written; `parts` is
    False for --no-parts. More ranks than GPUs share them, see `ep_runtime.bench.sharing`; skews are
    in `ep_runtime.bench.routing`. Mode hook reports the time that remains exposed.
    """

    tokens: tuple[int, ...] = (1, 8, 32, 64, 128)
    hidden: int = 7168
    topk: int = 8
    experts: tuple[int, ...] = (256, 32)
    ranks: int = 0
    share_gpu: bool = False
    dispatch_formats: tuple[str, ...] = ("fp8",)
    combine_formats: tuple[str, ...] = ("bf16",)
    recv_formats: tuple[str, ...] = ("batched", "compact")
    modes: tuple[Mode, ...] = ("fused",)
    skew: Skew = "uniform"
    pairs: int = 50
    replays: int = 20
    input_sets: int = 4
    peers: tuple[str, ...] = ("auto",)
    parts: bool = True
    backend: Backend = "auto"
    num_sms: int = 0
    max_tokens: int | None = None
    compute_us: float = 20.0
    link_gbs: float | None = None
    graph_mixing: bool = False
    out: Path | None = Path("benchmarks/results")
    label: str = ""
    plot: bool = False
    commit: str | None = None
    command: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        _one_of("skew", self.skew, get_args(Skew))
        _one_of("backend", self.backend, get_args(Backend))
        for name in ("tokens", "experts"):
            _not_empty(name, getattr(self, name))
        for name, allowed in (
            ("dispatch_formats", DISPATCH_FORMATS),
            ("combine_formats", COMBINE_FORMATS),
            ("recv_formats", RECV_FORMATS),
            ("modes", get_args(Mode)),
            ("peers", ("auto", "none", *PEERS)),
        ):
            _not_empty(name, getattr(self, name))
            for value in getattr(self, name):
                _one_of(name, value, allowed)
        if self.max_tokens is not None and self.max_tokens < max(self.tokens):
            raise ConfigError(
                f"max_tokens={self.max_tokens} is smaller than tokens={max(self.tokens)}; raise"
                " max_tokens or leave it out"
            )
        if self.backend == "host" and "hook" in self.modes:
            raise ConfigError(
                "modes=hook needs GPU kernels to overlap with; on backend=host use modes=split"
            )

    def _check_numbers(self) -> None:
        for name in ("pairs", "replays", "input_sets", "hidden", "topk"):
            _at_least(name, getattr(self, name), 1)
        if self.hidden % 128:
            raise ConfigError(f"hidden={self.hidden}: rows need a multiple of 128 channels")
        for name in ("ranks", "num_sms"):
            _at_least(name, getattr(self, name), 0)
        for value in self.tokens:
            _at_least("tokens", value, 1)
        for value in self.experts:
            _at_least("experts", value, self.topk)

    @property
    def buffer_tokens(self) -> int:
        """M of every buffer in the run."""
        return self.max_tokens or max(SMALLEST_MAX_TOKENS, *self.tokens)

    def wants(self, peer: str) -> bool:
        """Is `peer` to be measured (or reported absent)?"""
        return peer in self.peers or "auto" in self.peers


def _not_empty(name: str, values: tuple[object, ...]) -> None:
    if not values:
        raise ConfigError(f"{name} is empty: give at least one value")


def _at_least(name: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"{name}={value!r}: it must be an integer of at least {low}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(allowed)}")
