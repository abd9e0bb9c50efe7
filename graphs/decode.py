"""Pre-sized graphs of a decode step, and their replay by actual batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast, overload

import torch

from ep_runtime.buffer import Buffer
from ep_runtime.errors import CaptureError, ShapeError
from ep_runtime.graphs.audit import Audit
from ep_runtime.graphs.buckets import Buckets, as_ints
from ep_runtime.graphs.build import Builder, Entry, GraphReport, Sizes
from ep_runtime.graphs.capture import CaptureSite
from ep_runtime.graphs.modes import Tensors, without_grad
from ep_runtime.graphs.staging import (
    StaticInputs,
    checked_outputs,
    per_token_outputs,
    real_rows,
)

Step = Callable[[Tensors, torch.Tensor], Tensors]
GroupStep = Callable[[list[Tensors], list[torch.Tensor]], list[Tensors]]

D = TypeVar("D", Tensors, list[Tensors])  # tensors of one rank, or of all virtual ranks
N = TypeVar("N", int, Sequence[int])


class DecodeGraphs(Generic[D, N]):
    """A step captured for several batch sizes. Building one is collective.

    One rank per process: `step(inputs, num_tokens) -> outputs` and `make_inputs(rows) -> inputs`
    with dicts of tensors, and `replay(inputs, 5)`. Virtual ranks, given as a sequence of buffers:
    `step`, `make_inputs` and `replay` take and return a list with one dict (or scalar, or number)
    per rank, and one graph holds the step of all ranks.

    step         issues operations and computes; its sequence of operations may depend on the
                 bucket only. It gets [bucket, ...] inputs, of which rows from `num_tokens` (int32
                 scalar on the device) on are padding: pass it to `Buffer.dispatch`. It may hold
                 any number of operations, a dispatch alone included. It always runs without
                 gradients, and in inference mode if that was on here
    make_inputs  called once with the largest bucket; allocates the static inputs
    warmup       eager runs of the step per bucket before the capture, with 0 real tokens
    pool         torch's graph memory pool to share; see `pool`
    mixed        virtual ranks: captures for ranks in different buckets, as (bucket of rank 0, ...)

    Raises ShapeError for sizes that do not fit, CaptureError where the audit rejects a graph, and
    what the step raises. Several DecodeGraphs may share a Buffer; graphs may be replayed in any
    order and mixed with eager calls, as long as all ranks run the same sequence on each chain.
    """

    @overload
    def __init__(
        self: DecodeGraphs[Tensors, int],
        buffers: Buffer,
        step: Step,
        make_inputs: Callable[[int], Tensors],
        buckets: Buckets | Iterable[int],
        *,
        warmup: int = 2,
        pool: Any = None,
    ) -> None: ...

    @overload
    def __init__(
        self: DecodeGraphs[list[Tensors], Sequence[int]],
        buffers: Sequence[Buffer],
        step: GroupStep,
        make_inputs: Callable[[int], list[Tensors]],
        buckets: Buckets | Iterable[int],
        *,
        warmup: int = 2,
        pool: Any = None,
        mixed: Sequence[Sizes] = (),
    ) -> None: ...

    def __init__(
        self,
        buffers: Buffer | Sequence[Buffer],
        step: Any,
        make_inputs: Any,
        buckets: Buckets | Iterable[int],
        *,
        warmup: int = 2,
        pool: Any = None,
        mixed: Sequence[Sizes] = (),
    ) -> None:
        self._single = isinstance(buffers, Buffer)
        self._buffers = [buffers] if isinstance(buffers, Buffer) else list(buffers)
        self._step = step
        self.buckets = Buckets.of(buckets, self._buffers[0].config.max_tokens)
        self._inputs = self._allocate(make_inputs)
        self._loaded: Sizes = (0,) * len(self._buffers)
        self._entries = {sizes: Entry(sizes, self._bind(sizes)) for sizes in self._keys(mixed)}
        self._site: CaptureSite | None = None
        if self._buffers[0].device.type == "cuda":
            self._site = CaptureSite([buffer.device for buffer in self._buffers], pool)
        builder = Builder(self._buffers, self._site)
        builder.build(list(self._entries.values()), warmup)
        captured = [(entry.sizes, entry.graph.outputs) for entry in self._entries.values()]
        self._per_token = per_token_outputs(captured)

    # ---- replay ---------------------------------------------------------------------------------

    def replay(self, inputs: D | None, num_tokens: N) -> D:
        """Copy the inputs in, launch the smallest graph that fits, return the outputs.

        num_tokens: real tokens, 0 included. inputs: tensors with at least that many rows, or None
        where the caller has filled `static_inputs` itself. Outputs with a row for each token of
        the bucket, whatever the bucket is, are cut to the real tokens (where there is one bucket,
        all with as many rows); others come whole. They require no gradient, whatever the inputs
        do, are the graph's own memory and last until the next replay on the same pool. Launches
        on the current stream; neither synchronises nor allocates device memory. Replay all graphs
        that share a chain on one stream. Raises ShapeError before any launch, and what
        `Buffer.check()` raises; on the host backend also CaptureError where the step no longer
        issues the recorded operations.
        """
        counts = self._counts(num_tokens)
        entry = self._fitting(counts)
        self._load(inputs, counts)
        self._launch(entry)
        return self._cut(entry.graph.outputs, counts)

    def load(self, inputs: D | None, num_tokens: N) -> None:
        """Copy the inputs in and set the device scalars, as `replay` does, without a launch.

        Raises ShapeError, before any copy, for what fits no bucket.
        """
        counts = self._counts(num_tokens)
        self._fitting(counts)
        self._load(inputs, counts)

    def replay_bucket(self, bucket: int | Sizes) -> D:
        """Launch one graph on what was loaded last; its whole outputs, padding rows included.

        Raises CaptureError for a bucket that was not captured, ShapeError for one that is smaller
        than what was loaded.
        """
        entry = self._entry(bucket)
        if any(size < count for size, count in zip(entry.sizes, self._loaded, strict=True)):
            fits = self._told(self._fitting(self._loaded).sizes)
            raise ShapeError(
                f"bucket {bucket} is smaller than the {self._told(self._loaded)} tokens that were "
                f"loaded; replay bucket {fits} or a larger one, or load fewer"
            )
        self._launch(entry)
        return self._shape(entry.graph.outputs)

    def eager(self, inputs: D | None, num_tokens: N) -> D:
        """Run the step that `replay` would launch, without the graph; for comparison."""
        counts = self._counts(num_tokens)
        entry = self._fitting(counts)
        self._load(inputs, counts)
        return self._cut(entry.run(), counts)

    # ---- what was captured ----------------------------------------------------------------------

    def static_inputs(self, bucket: int | Sizes) -> D:
        """The tensors that the graph of `bucket` reads."""
        sizes = self._entry(bucket).sizes
        return self._shape([s.views(b) for s, b in zip(self._inputs, sizes, strict=True)])

    def static_outputs(self, bucket: int | Sizes) -> D:
        """The tensors that the graph of `bucket` writes, padding rows included."""
        return self._shape(self._entry(bucket).graph.outputs)

    def audit(self, bucket: int | Sizes) -> Audit:
        """Nodes, kernels, reset nodes (host: operations) of the graph of `bucket`."""
        return self._entry(bucket).graph.audit

    def report(self) -> list[GraphReport]:
        """One record per graph, smallest first."""
        return [self._report(entry) for _, entry in sorted(self._entries.items())]

    @property
    def pool(self) -> Any:
        """The graph memory pool, to hand to other captures; None on the host backend.

        Graphs that share a pool must not run at the same time.
        """
        return None if self._site is None else self._site.pool

    # ---- construction ---------------------------------------------------------------------------

    def _allocate(self, make_inputs: Callable[[int], Any]) -> list[StaticInputs]:
        rows = self.buckets.largest
        made = make_inputs(rows)
        per_rank = [made] if self._single else list(made)
        if len(per_rank) != len(self._buffers):
            raise ShapeError(
                f"make_inputs({rows}) gave inputs for {len(per_rank)} ranks; give one dict for "
                f"each of the {len(self._buffers)} buffers"
            )
        return [
            StaticInputs(inputs, rows, buffer.device)
            for inputs, buffer in zip(per_rank, self._buffers, strict=True)
        ]

    def _keys(self, mixed: Sequence[Sizes]) -> list[Sizes]:
        """Largest first: smaller captures then fit into memory that the pool already has."""
        uniform: list[Sizes] = [(size,) * len(self._buffers) for size in self.buckets]
        for sizes in mixed:
            if len(sizes) != len(self._buffers) or not set(sizes) <= set(self.buckets):
                raise ShapeError(
                    f"mixed sizes {tuple(sizes)}; give {len(self._buffers)} of the buckets "
                    f"{self.buckets.sizes}, one per rank"
                )
        keys = dict.fromkeys([*uniform, *(tuple(sizes) for sizes in mixed)])
        return sorted(keys, key=sum, reverse=True)

    def _bind(self, sizes: Sizes) -> Callable[[], list[Tensors]]:
        """The step over the static inputs of these buckets."""
        inputs = [static.views(size) for static, size in zip(self._inputs, sizes, strict=True)]
        counts = [static.num_tokens for static in self._inputs]
        if self._single:
            return without_grad(lambda: checked_outputs([self._step(inputs[0], counts[0])]))
        ranks = len(self._buffers)
        return without_grad(lambda: checked_outputs(self._step(inputs, counts), ranks))

    # ---- helpers --------------------------------------------------------------------------------

    def _counts(self, num_tokens: int | Sequence[int]) -> Sizes:
        counts = as_ints(num_tokens)
        if len(counts) != len(self._buffers):
            raise ShapeError(
                f"num_tokens has {len(counts)} entries; give one for each of the "
                f"{len(self._buffers)} ranks of this process"
            )
        return counts

    def _fitting(self, counts: Sizes) -> Entry:
        """The graph of the fewest rows in which every rank's tokens fit."""
        wanted = tuple(self.buckets.pick(count) for count in counts)
        exact = self._entries.get(wanted)
        if exact is not None:
            return exact
        fits = [
            entry
            for sizes, entry in self._entries.items()
            if all(size >= want for size, want in zip(sizes, wanted, strict=True))
        ]
        return min(fits, key=lambda entry: sum(entry.sizes))

    def _load(self, inputs: D | None, counts: Sizes) -> None:
        per_rank = self._listed(inputs)
        for static, mine, count in zip(self._inputs, per_rank, counts, strict=True):
            static.check(mine, count)
        for static, mine, count in zip(self._inputs, per_rank, counts, strict=True):
            static.load(mine, count)
        self._loaded = counts

    def _launch(self, entry: Entry) -> None:
        for buffer in self._buffers:
            buffer.check()
        entry.graph.replay()
        entry.replays += 1

    def _cut(self, outputs: list[Tensors], counts: Sizes) -> D:
        ranks = zip(outputs, self._per_token, counts, strict=True)
        return self._shape([real_rows(*mine) for mine in ranks])

    def _entry(self, bucket: int | Sizes) -> Entry:
        sizes = as_ints(bucket, "bucket")
        if not isinstance(bucket, Iterable):
            sizes *= len(self._buffers)
        entry = self._entries.get(sizes)
        if entry is None:
            raise CaptureError(
                f"bucket {bucket} was not captured; captured are {sorted(self._entries)}"
            )
        return entry

    def _report(self, entry: Entry) -> GraphReport:
        inputs = sum(s.num_bytes(b) for s, b in zip(self._inputs, entry.sizes, strict=True))
        return entry.report(inputs)

    def _listed(self, inputs: D | None) -> Sequence[Tensors | None]:
        if inputs is None:
            return [None] * len(self._buffers)
        listed = [inputs] if isinstance(inputs, dict) else list(inputs)
        if len(listed) != len(self._buffers):
            raise ShapeError(
                f"inputs for {len(listed)} ranks; give one dict for each of the "
                f"{len(self._buffers)} ranks of this process"
            )
        return listed

    def _told(self, sizes: Sizes) -> int | Sizes:
        """As the caller names them."""
        return sizes[0] if self._single else sizes

    def _shape(self, per_rank: list[Tensors]) -> D:
        return cast(D, per_rank[0] if self._single else per_rank)
