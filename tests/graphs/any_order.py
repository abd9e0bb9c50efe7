"""Drives chains through a random sequence of graph replays and eager calls, checking every result.

Whatever a chain did before, any dispatch and any combine may come next: graphs hold either alone,
or several in an order of their own (KINDS). Each move is done in one of three ways:

    replay  a graph of the bucket (or mix of buckets) that fits
    eager   the same step on the same padded tensors, without the graph
    exact   the same step on tensors of exactly the real size, without a device count

Checks run on the device and are added up per move; the host reads them once, at the end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import (
    EXPONENTS,
    Counts,
    RankCase,
    beyond_one_ulp,
    draw_case,
    draw_counts,
    rows_differ,
)
from steps import SETS, Step, Steps, Tensors

from ep_runtime import Buffer
from ep_runtime.graphs import DecodeGraphs

# The parts of each move, as steps.py reads them.
KINDS = {
    name: tuple(parts.split())
    for name, parts in {
        "dispatch": "d0 r0",
        "dispatch apart": "d1 r1",
        "combine": "c0 h0",
        "combine apart": "c1 h1",
        "pair": "d0 r0 c0 h0",
        "swap": "c0 h0 d0 r0",
        "two and two": "d0 r0 d1 r1 c1 h1 c0 h0",
        "again": "c0 h0 a0 h0",
        "beside": "d1 c0 r1 h0",
        "beside apart": "c1 d0 h1 r0",
    }.items()
}
BOTH = "both"  # chains, as two micro-batches
WAYS = ("replay", "replay", "eager", "exact")


@dataclass(slots=True)
class Use:
    """A case as it was dispatched: multiplied by 2**exponent."""

    ranks: list[RankCase]
    counts: Counts
    exponent: int


class Driver:
    """All graphs over one group (or over this process's rank of it), and the random walk.

    `shared` draws what every rank must do alike, `own` how this process does it.
    """

    def __init__(
        self,
        buffers: Sequence[Buffer],
        buckets: Sequence[int],
        seed: int,
        mixed: Sequence[Counts] = (),
    ) -> None:
        self.buffers = list(buffers)
        self.config = buffers[0].config
        self.shared = random.Random(seed)
        self.own = random.Random(seed * 1000 + buffers[0].rank)
        self._steps = Steps(buffers)
        self._groups = self._draw_groups(seed)
        self._made = [[0, 0], [0, 0]]  # dispatches and combines of each chain
        self._bad: list[torch.Tensor] = []
        self._moves: list[str] = []
        self._held = self._fill_with_nothing()
        self._graphs = self._capture(buckets, mixed)
        self._epochs = [[buffer.epochs(chain) for chain in (0, 1)] for buffer in self.buffers]

    # ---- set-up ---------------------------------------------------------------------------------

    def _draw_groups(self, seed: int) -> list[tuple[Counts, list[list[RankCase]]]]:
        """Cases that share their token counts, so that one step can use two of them."""
        num_ranks, most = self.buffers[0].num_ranks, self.config.max_tokens
        counts = [draw_counts(self.shared, num_ranks, most) for _ in range(10)]
        counts += [(0,) * num_ranks, (most,) * num_ranks]
        groups = []
        for number, mine in enumerate(counts):
            cases = [draw_case(self.config, mine, seed + 100 * number + v) for v in range(3)]
            local = [[c[b.rank].to(b.device) for b in self.buffers] for c in cases]
            groups.append((mine, local))
        return groups

    def _inputs(self, rows: int) -> list[Tensors]:
        config = self.config

        def one(device: torch.device) -> Tensors:
            x = torch.zeros((rows, config.hidden), dtype=torch.bfloat16, device=device)
            idx = torch.full((rows, config.topk), -1, device=device)
            weights = torch.zeros((rows, config.topk), device=device)
            first = {"x": x, "idx": idx, "weights": weights}
            return first | {f"{name}2": tensor.clone() for name, tensor in first.items()}

        return [one(buffer.device) for buffer in self.buffers]

    def _fill_with_nothing(self) -> dict[tuple[int, int], Use]:
        """Dispatch no tokens into every set of tensors: then each has a handle to combine."""
        nothing = (0,) * self.buffers[0].num_ranks
        cases = next(cases for counts, cases in self._groups if counts == nothing)
        held = {}
        for chain in (0, 1):
            for number in SETS:
                step = self._steps.of((f"d{number}", f"r{number}"), chain)
                step(self._inputs(0), [None] * len(self.buffers))
                held[chain, number] = Use(cases[0], nothing, 0)
        return held

    def _capture(
        self, buckets: Sequence[int], mixed: Sequence[Counts]
    ) -> dict[tuple[str, int], DecodeGraphs[list[Tensors], Sequence[int]]]:
        graphs: dict[tuple[str, int], DecodeGraphs[list[Tensors], Sequence[int]]] = {}
        pool = None
        for kind, chain in [*((kind, chain) for kind in KINDS for chain in (0, 1)), (BOTH, 0)]:
            graphs[kind, chain] = DecodeGraphs(
                self.buffers,
                self._step(kind, chain),
                self._inputs,
                buckets,
                warmup=1,
                pool=pool,
                mixed=mixed,
            )
            pool = graphs[kind, chain].pool
        return graphs

    def _step(self, kind: str, chain: int) -> Step:
        return self._steps.overlapped if kind == BOTH else self._steps.of(KINDS[kind], chain)

    # ---- the walk -------------------------------------------------------------------------------

    def run(self, num_operations: int) -> int:
        """Moves until that many operations per rank were made; returns how many were."""
        while self._operations() < num_operations:
            if self.shared.random() < 0.1:
                self._overlap()
            else:
                self._move(self.shared.choice(list(KINDS)), self.shared.randrange(2))
        return self._operations()

    def _operations(self) -> int:
        return sum(map(sum, self._made))

    def _move(self, kind: str, chain: int) -> None:
        parts = KINDS[kind]
        counts, cases = self._pick(chain, parts)
        uses = [self._use(self.shared.choice(cases), counts) for _ in range(2)]
        filled, wanted = self._plan(chain, parts, uses)
        self._begin(f"{kind} on chain {chain}")
        for number in filled:
            self._poison(chain, number, rows=not _combined_first(parts, number))
        outputs = self._do(kind, chain, uses, counts)
        for number, use in filled.items():
            self._held[chain, number] = use
            self._check_received(chain, number, use)
        for name, (use, factor) in wanted.items():
            self._check_home(outputs, name, use, factor)

    def _plan(
        self, chain: int, parts: Sequence[str], uses: Sequence[Use]
    ) -> tuple[dict[int, Use], dict[str, tuple[Use, float]]]:
        """What the sets hold after these parts, and what each output is a combine of."""
        fresh, filled = iter(uses), dict[int, Use]()
        wanted: dict[str, tuple[Use, float]] = {}
        for part in parts:
            kind, number = part[0], int(part[1])
            if kind == "d":
                filled[number] = next(fresh)
                self._made[chain][0] += 1
            elif kind in "ca":
                use = filled.get(number, self._held[chain, number])
                wanted[f"out{len(wanted)}"] = (use, 2.0 if kind == "a" else 1.0)
                self._made[chain][1] += 1
        return filled, wanted

    def _overlap(self) -> None:
        counts, cases = self.shared.choice(self._groups)
        uses = [self._use(self.shared.choice(cases), counts) for _ in range(2)]
        self._begin("both chains")
        for chain in (0, 1):
            self._poison(chain, 0, rows=True)
        outputs = self._do(BOTH, 0, uses, counts)
        for chain in (0, 1):
            self._held[chain, 0] = uses[chain]
            self._check_received(chain, 0, uses[chain])
            self._check_home(outputs, f"out{chain}", uses[chain])
            self._made[chain] = [made + 1 for made in self._made[chain]]

    def _pick(self, chain: int, parts: Sequence[str]) -> tuple[Counts, list[list[RankCase]]]:
        """Token counts and cases; those of what was dispatched before, where that is combined."""
        for number in SETS:
            if _combined_first(parts, number):
                before = self._held[chain, number].counts
                return next(group for group in self._groups if group[0] == before)
        return self.shared.choice(self._groups)

    def _use(self, ranks: list[RankCase], counts: Counts) -> Use:
        return Use(ranks, counts, self.shared.choice(EXPONENTS))

    def _do(self, kind: str, chain: int, uses: list[Use], counts: Counts) -> list[Tensors]:
        way = self.own.choice(WAYS)
        self._moves[-1] += f", {way}, tokens {counts}"
        inputs = [
            {**_scaled(uses[0], rank, ""), **_scaled(uses[1], rank, "2")}
            for rank in range(len(self.buffers))
        ]
        graphs = self._graphs[kind, chain]
        mine = [counts[buffer.rank] for buffer in self.buffers]
        if way == "replay":
            return graphs.replay(inputs, mine)
        if way == "eager":
            return graphs.eager(inputs, mine)
        return self._step(kind, chain)(inputs, [None] * len(inputs))

    # ---- checks ---------------------------------------------------------------------------------

    def _begin(self, text: str) -> None:
        """Start a tally."""
        self._moves.append(f"move {len(self._moves)}: {text}")
        self._bad.append(torch.zeros((), dtype=torch.int64, device=self.buffers[0].device))

    def _poison(self, chain: int, number: int, rows: bool) -> None:
        """What a dispatch must write. rows: those too; else they are still to be combined."""
        for received in self._steps.received[chain, number]:
            assert received.source_token is not None
            assert received.layout_range is not None
            for tensor in (received.recv_count, received.num_messages, received.layout_range):
                tensor.fill_(-7)
            received.source_token.fill_(-7)
            if rows:
                received.x.view(torch.uint8).fill_(0xFF)
                if received.scales is not None:
                    received.scales.fill_(torch.nan)

    def _count(self, bad: torch.Tensor) -> None:
        self._bad[-1].add_(bad.to(self._bad[-1].device))

    def _check_received(self, chain: int, number: int, use: Use) -> None:
        for received, wanted in zip(self._steps.received[chain, number], use.ranks, strict=True):
            scale = 2.0**use.exponent
            rows = wanted.rows if wanted.scales is not None else wanted.rows * scale
            self._count((received.recv_count != wanted.recv_count).sum())
            self._count((received.num_messages != wanted.num_messages).sum())
            self._count((received.layout_range != wanted.layout_range).sum())
            self._count(((received.source_token != wanted.source_token) & wanted.valid).sum())
            self._count(rows_differ(received.x, rows, wanted.valid))
            if received.scales is not None and wanted.scales is not None:
                self._count(rows_differ(received.scales, wanted.scales * scale, wanted.valid))

    def _check_home(self, outputs: list[Tensors], name: str, use: Use, factor: float = 1.0) -> None:
        for found, wanted in zip(outputs, use.ranks, strict=True):
            out = found[name]
            assert out.shape == wanted.out.shape
            self._count(beyond_one_ulp(out, wanted.out * (factor * 2.0**use.exponent)))

    def require_all_right(self) -> None:
        """Read the tallies, and the epochs: every operation has advanced its chain once."""
        bad = torch.stack(self._bad).tolist()
        wrong = [f"{move}: {n} wrong" for move, n in zip(self._moves, bad, strict=True) if n]
        assert not wrong, "\n".join([f"{len(wrong)} of {len(bad)} moves failed", *wrong[:10]])
        for buffer, epochs in zip(self.buffers, self._epochs, strict=True):
            buffer.check()
            for chain in (0, 1):
                wanted = [
                    s + made for s, made in zip(epochs[chain], self._made[chain], strict=True)
                ]
                assert buffer.epochs(chain) == tuple(wanted)

    def replays(self) -> list[int]:
        """Launches of every graph so far."""
        return [r.replays for graphs in self._graphs.values() for r in graphs.report()]


def _combined_first(parts: Sequence[str], number: int) -> bool:
    """True if these parts combine what the set of tensors held before them."""
    touched = [part[0] for part in parts if part[0] in "dca" and int(part[1]) == number]
    return bool(touched) and touched[0] != "d"


def _scaled(use: Use, rank: int, suffix: str) -> Tensors:
    case = use.ranks[rank]
    return {
        f"x{suffix}": case.x * 2.0**use.exponent,
        f"idx{suffix}": case.topk_idx,
        f"weights{suffix}": case.topk_weights,
    }
