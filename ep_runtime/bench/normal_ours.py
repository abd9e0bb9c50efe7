"""Our normal operations as the benchmark times them: checked, then captured or called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep_runtime.bench.clock import Body, Mark
from ep_runtime.bench.normal_problem import NormalProblem
from ep_runtime.normal import NormalBuffer, NormalReceived

OPS = ("dispatch", "dispatch_cached", "combine", "pair")


class OurNormal:
    """One problem on one buffer."""

    def __init__(self, buffer: NormalBuffer, problem: NormalProblem) -> None:
        self._buffer = buffer
        self._problem = problem
        self._worst = buffer.num_ranks * problem.sizes.num_tokens

    def _dispatch(self, *, exact: bool, num_sms: int) -> NormalReceived:
        inputs = self._problem.inputs
        return self._buffer.dispatch(
            self._problem.rows,
            inputs.topk_idx,
            inputs.topk_weights,
            num_experts=self._problem.sizes.num_experts,
            num_worst_tokens=0 if exact else self._worst,
            num_sms=num_sms,
        )

    def check(self, num_sms: int, *, exact: bool) -> str:
        """Run a dispatch, a cached one and a combine; what is wrong, or ""."""
        problem, buffer = self._problem, self._buffer
        received = self._dispatch(exact=exact, num_sms=num_sms)
        wrong = problem.wrong_rows(received.x, received.scales)
        cached = buffer.dispatch_cached(problem.rows, received.handle, num_sms=num_sms)
        wrong = wrong or problem.wrong_rows(cached.x, cached.scales)
        out = torch.full_like(problem.inputs.x, float("nan"))
        buffer.combine(received.x.bfloat16(), received.handle, out=out, num_sms=num_sms)
        wrong = wrong or problem.wrong_sum(out)
        buffer.check()
        return wrong

    def body(self, op: str, num_sms: int, repeats: int, *, exact: bool) -> Body:
        """`repeats` operations. What an operation needs is made here, outside of the clock."""
        received = self._dispatch(exact=exact, num_sms=num_sms)
        rows = received.x.bfloat16()
        out = torch.empty_like(self._problem.inputs.x)
        handle = received.handle
        del received

        def dispatch() -> object:
            return self._dispatch(exact=exact, num_sms=num_sms)

        def cached() -> object:
            return self._buffer.dispatch_cached(self._problem.rows, handle, num_sms=num_sms)

        def combine() -> object:
            return self._buffer.combine(rows, handle, out=out, num_sms=num_sms)

        def pair() -> object:
            sent = self._dispatch(exact=exact, num_sms=num_sms)
            return self._buffer.combine(rows, sent.handle, out=out, num_sms=num_sms)

        runs: dict[str, Callable[[], object]] = {
            "dispatch": dispatch,
            "dispatch_cached": cached,
            "combine": combine,
            "pair": pair,
        }
        return repeated(runs[op], repeats)


def repeated(run: Callable[[], Any], repeats: int) -> Body:
    """A body for a clock."""

    def body(_mark: Mark) -> None:
        for _ in range(repeats):
            run()

    return body
