"""The decode engine: prompts over ranks, one graph replay per step, a report at the end."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_runtime.buffer import Buffer
from ep_runtime.graphs import Buckets, DecodeGraphs
from ep_runtime.lm.check import GREEDY, CheckReport, Sampling, merge_checks
from ep_runtime.lm.checkpoint import Checkpoint
from ep_runtime.lm.parallel import DecodeStep, RankModel, Tensors
from ep_runtime.lm.schedule import Batch, assign, check_lengths, count_steps

OnToken = Callable[[int, int], None]  # (prompt index, byte)


@dataclass(frozen=True, slots=True)
class DecodedSequence:
    """logits [len(generated), 256] float32 on the CPU, or None where they were not kept."""

    index: int
    prompt: bytes
    generated: bytes
    logits: Tensor | None = None

    @property
    def text(self) -> str:
        return (self.prompt + self.generated).decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What a run decoded and what it cost: of one process, or of all after `merge_reports`.

    seconds          wall clock of the whole loop (merged: the slowest rank's)
    step_us          host time of every step, from its inputs to its tokens on the host
                     (merged: of the rank with the largest median)
    replays          bucket -> number of replays
    launches         bucket -> kernels per step (host: operations on the buffers)
    bytes_dispatched, bytes_combined   payload sent, over all steps
    """

    sequences: tuple[DecodedSequence, ...]
    num_ranks: int
    backend: str
    seconds: float
    step_us: tuple[float, ...]
    replays: dict[int, int]
    launches: dict[int, int]
    bytes_dispatched: int
    bytes_combined: int
    check: CheckReport | None = None

    @property
    def texts(self) -> list[str]:
        """Prompt and continuation, in the order of the prompts."""
        return [sequence.text for sequence in sorted(self.sequences, key=lambda s: s.index)]

    @property
    def generated(self) -> list[bytes]:
        """What was decoded, in the order of the prompts."""
        return [sequence.generated for sequence in sorted(self.sequences, key=lambda s: s.index)]

    @property
    def num_tokens(self) -> int:
        """Generated tokens; bytes of prompts are not counted."""
        return sum(len(sequence.generated) for sequence in self.sequences)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def step_median_us(self) -> float:
        return statistics.median(self.step_us) if self.step_us else 0.0

    def without_logits(self) -> DecodeReport:
        """For sending it to another process."""
        return replace(self, sequences=tuple(replace(s, logits=None) for s in self.sequences))


def merge_reports(reports: Sequence[DecodeReport]) -> DecodeReport:
    """One report for the reports of all processes."""
    slowest = max(reports, key=lambda report: report.step_median_us)
    replays: Counter[int] = Counter()
    for report in reports:
        replays.update(report.replays)
    checks = [report.check for report in reports if report.check is not None]
    return replace(
        slowest,
        sequences=tuple(
            sorted((s for report in reports for s in report.sequences), key=lambda s: s.index)
        ),
        seconds=max(report.seconds for report in reports),
        replays=dict(sorted(replays.items())),
        bytes_dispatched=sum(report.bytes_dispatched for report in reports),
        bytes_combined=sum(report.bytes_combined for report in reports),
        check=merge_checks(checks) if checks else None,
    )


class Decoder:
    """A model on the ranks of this process, its step captured for every bucket. Collective.

    buffers       this process's rank, or all virtual ranks; batches go up to their max_tokens
    microbatches  parts of a batch that are interleaved, each on a chain of its own
    Raises ConfigError where the group does not fit the checkpoint, and what DecodeGraphs raises.
    """

    def __init__(
        self, checkpoint: Checkpoint, buffers: Sequence[Buffer], microbatches: int = 1
    ) -> None:
        self.config = checkpoint.config
        self.buffers = list(buffers)
        self.batch = self.buffers[0].config.max_tokens
        self.microbatches = microbatches
        self.models = [RankModel(checkpoint, buffer) for buffer in self.buffers]
        step = DecodeStep(self.models, microbatches)
        buckets = Buckets.powers_of_two(self.batch)
        self.graphs = DecodeGraphs(self.buffers, step, step.make_inputs, buckets)

    def run(
        self,
        prompts: Sequence[bytes],
        num_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        eager: bool = False,
        keep_logits: bool = False,
        on_token: OnToken | None = None,
    ) -> DecodeReport:
        """Decode `num_tokens` bytes after every prompt. Collective: all ranks pass all prompts.

        A prompt is fed through the same step, one byte at a time. All ranks run the same number of
        steps, with zero tokens where one has nothing to do. eager: run the step without its graph.
        keep_logits: hold what `check_against_reference` needs. on_token: called for this process's
        tokens as they come. Raises ShapeError where a text exceeds the model's context, and what
        `Buffer.check()` raises.
        """
        check_lengths(prompts, num_tokens, self.config.max_context)
        num_ranks = self.buffers[0].num_ranks
        run = _Run(self, sampling, eager, keep_logits, on_token)
        batches = [
            Batch(assign(prompts, num_tokens, buffer.rank, num_ranks), self.batch)
            for buffer in self.buffers
        ]
        sequences = [sequence for batch in batches for sequence in batch.all_sequences]
        before = self._replays()
        started = time.perf_counter()
        for _ in range(count_steps(prompts, num_tokens, num_ranks, self.batch)):
            run.step(batches)
        seconds = time.perf_counter() - started
        replays = {b: n - before[b] for b, n in self._replays().items() if n > before[b]}
        return DecodeReport(
            sequences=tuple(
                DecodedSequence(
                    s.index,
                    s.prompt,
                    bytes(s.generated),
                    torch.stack(s.logits) if keep_logits else None,
                )
                for s in sequences
            ),
            num_ranks=num_ranks,
            backend=self.buffers[0].backend,
            seconds=seconds,
            step_us=tuple(run.step_us),
            replays=replays,
            launches={report.sizes[0]: report.launches for report in self.graphs.report()},
            bytes_dispatched=run.bytes_dispatched,
            bytes_combined=run.bytes_combined,
        )

    def _replays(self) -> dict[int, int]:
        """Per bucket, which all virtual ranks share."""
        return {report.sizes[0]: report.replays for report in self.graphs.report()}


class _Run:
    """One call of Decoder.run: staging of inputs, choice of tokens, measurements."""

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        eager: bool,
        keep_logits: bool,
        on_token: OnToken | None,
    ) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._launch = decoder.graphs.eager if eager else decoder.graphs.replay
        self._want_logits = keep_logits or sampling.temperature > 0
        self._keep_logits = keep_logits
        self._on_token = on_token
        on_gpu = decoder.buffers[0].backend == "cuda"
        self._staging = [
            {
                name: torch.zeros(decoder.batch, dtype=torch.int64, pin_memory=on_gpu)
                for name in ("tokens", "positions")
            }
            for _ in decoder.buffers
        ]
        # A graph's reset nodes zero the statistics at the start of every replay.
        self._reset_by_graph = not eager
        self._seen = self._traffic()
        self.bytes_dispatched = 0
        self.bytes_combined = 0
        self.step_us: list[float] = []

    def step(self, batches: Sequence[Batch]) -> None:
        """Feed one byte of every row, take one, refill rows."""
        started = time.perf_counter()
        for staged, batch in zip(self._staging, batches, strict=True):
            for row, sequence in enumerate(batch.rows):
                staged["tokens"][row] = sequence.token
                staged["positions"][row] = sequence.position
        outputs = self._launch(self._staging, [len(batch.rows) for batch in batches])
        chosen = [self._to_host(mine) for mine in outputs]
        self.step_us.append((time.perf_counter() - started) * 1e6)
        for model, batch, (tokens, logits) in zip(
            self._decoder.models, batches, chosen, strict=True
        ):
            self._take(batch, tokens, logits)
            for source, target in batch.retire():
                model.move_row(source, target)
        self._count_traffic()

    def _to_host(self, outputs: Tensors) -> tuple[list[int], Tensor | None]:
        logits = outputs["logits"].to("cpu", copy=True) if self._want_logits else None
        return outputs["next"].tolist(), logits

    def _take(self, batch: Batch, tokens: list[int], logits: Tensor | None) -> None:
        for row, sequence in enumerate(batch.rows):
            token = tokens[row]
            if sequence.generating:
                if logits is not None and self._sampling.temperature > 0:
                    scores = self._sampling.scores(logits[row], sequence.index, sequence.position)
                    token = int(scores.argmax())
                if logits is not None and self._keep_logits:
                    sequence.logits.append(logits[row])
                if self._on_token is not None:
                    self._on_token(sequence.index, token)
            sequence.advance(token)

    def _traffic(self) -> tuple[int, int]:
        stats = [
            buffer.stats(chain)
            for buffer in self._decoder.buffers
            for chain in range(self._decoder.microbatches)
        ]
        return sum(s.bytes_dispatched for s in stats), sum(s.bytes_combined for s in stats)

    def _count_traffic(self) -> None:
        now = self._traffic()
        before = (0, 0) if self._reset_by_graph else self._seen
        self.bytes_dispatched += now[0] - before[0]
        self.bytes_combined += now[1] - before[1]
        self._seen = now
