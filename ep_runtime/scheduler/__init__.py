"""Two micro-batches in turn, so that one communicates while the other computes.

A micro-batch is a generator that yields each pending receive and gets its result back:

    def layer(buffer, chain, h, routes):
        received = yield buffer.dispatch(attention(h), *routes, chain=chain)
        return (yield buffer.combine(experts(received), received.handle))

    a, b = run_interleaved([layer(buffer, 0, *first), layer(buffer, 1, *second)])

`plan` measures whether that pays, and says so with a timeline; where it does not, its `run` is
`run_serial`.
"""

from ep_runtime.scheduler.clock import Clock, CudaClock, HostClock, clock_for, default_clock
from ep_runtime.scheduler.plan import OverlapPlan, choose, plan, trace
from ep_runtime.scheduler.run import MicroBatch, Stage, Waitable, run_interleaved, run_serial
from ep_runtime.scheduler.timeline import Span, Timeline, predict

__all__ = [
    "Clock",
    "CudaClock",
    "HostClock",
    "MicroBatch",
    "OverlapPlan",
    "Span",
    "Stage",
    "Timeline",
    "Waitable",
    "choose",
    "clock_for",
    "default_clock",
    "plan",
    "predict",
    "run_interleaved",
    "run_serial",
    "trace",
]
