"""Drives chains through a random sequence of graph replays and eager calls, checking every result.

Whatever a chain did before, the next thing on it is drawn from what is legal: a dispatch when it is
idle, a combine when it has dispatched. Each is done in one of three ways:

    replay  a graph of the bucket (or mix of buckets) that fits
    eager   the same step on the same padded tensors, without the graph
    exact   the same step on tensors of exactly the real size, without a device count

Checks run on the device and are added up per move; the host reads them once, at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
from steps import Steps, Tensors

from ep_runtime import Buffer
from ep_runtime.graphs import DecodeGraphs

# move: (operations on the chain, may start when idle, ends idle)
KINDS = {
    "dispatch": (1, True, False),
    "combine": (1, False, True),
    "pair": (2, True, True),
    "triple": (3, True, False),  # dispatch, combine, dispatch
    "swap": (2, False, False),  # combine, dispatch
}
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
        self._open: list[Use | None] = [None, None]
        self._operations = [0, 0]
        self._bad: list[torch.Tensor] = []
        self._moves: list[str] = []
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

    def _capture(
        self, buckets: Sequence[int], mixed: Sequence[Counts]
    ) -> dict[tuple[str, int], DecodeGraphs[list[Tensors], Sequence[int]]]:
        graphs: dict[tuple[str, int], DecodeGraphs[list[Tensors], Sequence[int]]] = {}
        pool = None
        for kind, chain in [*((kind, chain) for kind in KINDS for chain in (0, 1)), ("both", 0)]:
            step = self._steps.overlapped if kind == "both" else self._steps.of(kind, chain)
            _, from_idle, to_idle = KINDS.get(kind, (0, True, True))
            graphs[kind, chain] = DecodeGraphs(
                self.buffers,
                step,
                self._inputs,
                buckets,
                warmup=1,
                pool=pool,
                mixed=mixed,
                open_chain=None if from_idle else self._runs_empty("dispatch", chain),
                close_chain=None if to_idle else self._runs_empty("combine", chain),
            )
            pool = graphs[kind, chain].pool
        return graphs

    def _runs_empty(self, kind: str, chain: int) -> Callable[[tuple[int, ...]], None]:
        def run(_: tuple[int, ...]) -> None:
            self._steps.of(kind, chain)(self._inputs(0), [None] * len(self.buffers))

        return run

    # ---- the walk -------------------------------------------------------------------------------

    def run(self, num_operations: int) -> int:
        """Moves until that many operations per rank were made; returns how many were."""
        while sum(self._operations) < num_operations or self._open != [None, None]:
            chain = self.shared.randrange(2)
            idle = self._open[chain] is None
            if idle and self._open[1 - chain] is None and self.shared.random() < 0.2:
                self._overlap()
                continue
            kinds = [kind for kind, (_, from_idle, _) in KINDS.items() if from_idle == idle]
            if sum(self._operations) >= num_operations:
                kinds = ["combine"] if not idle else []
            if kinds:
                self._move(self.shared.choice(kinds), chain)
        return sum(self._operations)

    def _move(self, kind: str, chain: int) -> None:
        operations, _, to_idle = KINDS[kind]
        before = self._open[chain]
        counts, cases = self._pick(before if kind in ("combine", "swap") else None)
        uses = [self._use(self.shared.choice(cases), counts) for _ in range(2)]
        if kind == "combine":
            assert before is not None
            uses = [before, before]
        self._begin(f"{kind} on chain {chain}", chain)
        outputs = self._do(kind, chain, uses, counts)
        if kind != "dispatch":
            home = before if kind in ("combine", "swap") else uses[0]
            assert home is not None
            self._check_home(outputs, chain, home)
        if kind != "combine":
            self._check_received(chain, uses[1] if kind == "triple" else uses[0])
        self._open[chain] = None if to_idle else uses[1 if kind == "triple" else 0]
        self._operations[chain] += operations

    def _overlap(self) -> None:
        counts, cases = self._pick(None)
        uses = [self._use(self.shared.choice(cases), counts) for _ in range(2)]
        self._begin("both chains", 0, 1)
        outputs = self._do("both", 0, uses, counts)
        for chain in (0, 1):
            self._check_received(chain, uses[chain])
            self._check_home(outputs, chain, uses[chain])
            self._operations[chain] += 2

    def _pick(self, before: Use | None) -> tuple[Counts, list[list[RankCase]]]:
        """Token counts and cases; those of what is to be combined, where there is such."""
        if before is None:
            return self.shared.choice(self._groups)
        return next(group for group in self._groups if group[0] == before.counts)

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
        step = self._steps.overlapped if kind == "both" else self._steps.of(kind, chain)
        return step(inputs, [None] * len(inputs))

    # ---- checks ---------------------------------------------------------------------------------

    def _begin(self, text: str, *chains: int) -> None:
        """Start a tally and poison what the move must write."""
        self._moves.append(f"move {len(self._moves)}: {text}")
        self._bad.append(torch.zeros((), dtype=torch.int64, device=self.buffers[0].device))
        for chain in chains:
            for received in self._steps.received[chain]:
                received.recv_count.fill_(-7)
                received.num_messages.fill_(-7)
                if self._open[chain] is None:  # else its rows are still to be combined
                    received.x.view(torch.uint8).fill_(0xFF)
                    if received.scales is not None:
                        received.scales.fill_(torch.nan)

    def _count(self, bad: torch.Tensor) -> None:
        self._bad[-1].add_(bad.to(self._bad[-1].device))

    def _check_received(self, chain: int, use: Use) -> None:
        for received, wanted in zip(self._steps.received[chain], use.ranks, strict=True):
            scale = 2.0**use.exponent
            rows = wanted.rows if wanted.scales is not None else wanted.rows * scale
            self._count((received.recv_count != wanted.recv_count).sum())
            self._count((received.num_messages != wanted.num_messages).sum())
            self._count(rows_differ(received.x, rows, wanted.valid))
            if received.scales is not None and wanted.scales is not None:
                self._count(rows_differ(received.scales, wanted.scales * scale, wanted.valid))

    def _check_home(self, outputs: list[Tensors], chain: int, use: Use) -> None:
        for found, wanted in zip(outputs, use.ranks, strict=True):
            out = found[f"out{chain}"]
            assert out.shape == wanted.out.shape
            self._count(beyond_one_ulp(out, wanted.out * 2.0**use.exponent))

    def require_all_right(self) -> None:
        """Read the tallies, and the epochs: every operation has advanced its chain once."""
        bad = torch.stack(self._bad).tolist()
        wrong = [f"{move}: {n} wrong" for move, n in zip(self._moves, bad, strict=True) if n]
        assert not wrong, "\n".join([f"{len(wrong)} of {len(bad)} moves failed", *wrong[:10]])
        for buffer, epochs in zip(self.buffers, self._epochs, strict=True):
            buffer.check()
            for chain in (0, 1):
                pairs = self._operations[chain] // 2
                start = epochs[chain]
                assert buffer.epochs(chain) == (start[0] + pairs, start[1] + pairs)

    def replays(self) -> list[int]:
        """Launches of every graph so far."""
        return [r.replays for graphs in self._graphs.values() for r in graphs.report()]


def _scaled(use: Use, rank: int, suffix: str) -> Tensors:
    case = use.ranks[rank]
    return {
        f"x{suffix}": case.x * 2.0**use.exponent,
        f"idx{suffix}": case.topk_idx,
        f"weights{suffix}": case.topk_weights,
    }
