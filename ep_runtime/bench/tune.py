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
from ep_runtime.errors import BuildError
from ep_runtime.normal.tuned import TunedSms, tuned_path, write_tuned

CLOSE_ENOUGH = 1.05  # of the fastest count's time
SMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 0)


def main(options: NormalOptions, path: Path | None, console: Console) -> int:
    """Measure, choose, write. Raises BuildError without GPUs, or where a measurement failed."""
    if not torch.cuda.is_available():
        raise BuildError("tune: torch sees no GPU, and CPU ranks have nothing to tune")
    options = replace(options, timings=("graph",), peers=("none",), out=None, backend="cuda")
    records = normal.run(options)
    if env.read().rank:
        return 0
    chosen, first = choose(records), records[0]
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
    """The smallest counts within CLOSE_ENOUGH of the fastest, in every size and format measured.

    Raises BuildError where something was wrong, or nothing was measured.
    """
    bad = next((r for r in records if r.status != "ok"), None)
    if bad is not None:
        raise BuildError(f"tune: {bad.op} was {bad.status}: {bad.reason}; nothing was written")
    return TunedSms(_fewest(records, "dispatch"), _fewest(records, "combine"))


def _fewest(records: Sequence[NormalRecord], op: str) -> int:
    times: dict[tuple[int, str], dict[int, float]] = {}
    for record in records:
        if record.op == op and record.median_us is not None:
            case = times.setdefault((record.num_tokens, record.dispatch_format), {})
            case[record.num_sms] = record.median_us
    if not times:
        raise BuildError(f"tune: {op} was not measured; nothing was written")
    return max(
        min(sms for sms, us in case.items() if us <= CLOSE_ENOUGH * min(case.values()))
        for case in times.values()
    )
