"""`ep-runtime tune`: the fewest SMs that are nearly as fast as more of them, on this machine.

SMs that communication leaves alone compute: a count is taken where more would gain little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ep_runtime import env
from ep_runtime.bench import normal
from ep_runtime.bench.normal_options import NormalOptions
from ep_runtime.bench.normal_records import NormalRecord
from ep_runtime.bench.out import is_first
from ep_runtime.bench.sharing import Plan, plan_ranks
from ep_runtime.errors import BuildError
from ep_runtime.normal.tuned import TunedSms, tuned_path, write_tuned

CLOSE_ENOUGH = 1.05  # of the fastest count's time
SMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 0)


def main(options: NormalOptions, path: Path | None, console: Console) -> int:
    """Measure, choose, write. Raises BuildError without a GPU for each rank, or where a measurement
    failed."""
    if not torch.cuda.is_available():
        raise BuildError("tune: torch sees no GPU, and CPU ranks have nothing to tune")
    options = replace(options, timings=("graph",), peers=("none",), out=None, backend="cuda")
    gpus = torch.cuda.device_count()
    _refuse_sharing(plan_ranks(options.session(), env.read(), cuda=True, num_gpus=gpus))
    records = normal.run(options)
    chosen, first = choose(records), records[0]
    if not is_first():
        return 0
    target = tuned_path() if path is None else path
    write_tuned(target, first.machine.device, first.num_ranks, chosen)
    console.print(
        f"{first.machine.device}, {first.num_ranks} ranks: dispatch {chosen.dispatch} SMs, combine"
        f" {chosen.combine}; wrote {target}",
        markup=False,
        highlight=False,
    )
    return 0


def choose(records: Sequence[NormalRecord]) -> TunedSms:
    """For each operation the smallest count that is within CLOSE_ENOUGH of the fastest in every
    size and format measured; where there is none, the one whose worst ratio is smallest.

    Raises BuildError where something was wrong, nothing was measured, or ranks shared a GPU.
    """
    for record in records:
        if record.status != "ok":
            raise BuildError(
                f"tune: {record.op} was {record.status}: {record.reason}; nothing was written"
            )
        _refuse_sharing(record)
    return TunedSms(_fewest(records, "dispatch"), _fewest(records, "combine"))


def _refuse_sharing(placed: Plan | NormalRecord) -> None:
    """Buffers of ranks with a GPU each would use what was measured without a link."""
    if placed.ranks_per_gpu > 1:
        raise BuildError(
            f"tune: {placed.ranks_per_gpu} of the {placed.num_ranks} ranks would share a GPU, and"
            " what is measured then says nothing about ranks with a GPU each; nothing was written."
            " Tune with as many ranks as GPUs, two at least"
        )


def _fewest(records: Sequence[NormalRecord], op: str) -> int:
    times: dict[tuple[int, str], dict[int, float]] = {}
    for record in records:
        if record.op == op and record.median_us is not None:
            case = times.setdefault((record.num_tokens, record.dispatch_format), {})
            case[record.num_sms] = record.median_us
    counts = set[int].intersection(*(set(case) for case in times.values())) if times else set()
    if not counts:
        raise BuildError(f"tune: {op} was not measured; nothing was written")
    worst = {sms: max(case[sms] / min(case.values()) for case in times.values()) for sms in counts}
    close = [sms for sms in counts if worst[sms] <= CLOSE_ENOUGH]
    return min(close) if close else min(counts, key=lambda sms: (worst[sms], sms))
