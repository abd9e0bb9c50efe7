"""Timelines of micro-batches: predicted, measured, drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ep_runtime.scheduler.run import SpanKind

_MARK: dict[SpanKind, str] = {"compute": "#", "wait": "."}


@dataclass(frozen=True, slots=True)
class Span:
    """What micro-batch `lane` did from `start_us` to `end_us`."""

    lane: int
    kind: SpanKind
    start_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of one run, in order of start, from 0."""

    spans: tuple[Span, ...]

    @property
    def total_us(self) -> float:
        return max((span.end_us for span in self.spans), default=0.0)

    def us(self, kind: SpanKind) -> float:
        """Time of all spans of a kind."""
        return sum(span.us for span in self.spans if span.kind == kind)

    def draw(self, title: str, scale_us: float, width: int = 64) -> str:
        """One line per micro-batch: `#` computes and sends, `.` waits; `width` is `scale_us`."""
        lanes = sorted({span.lane for span in self.spans})
        lines = [f"{title}: {self.total_us:.1f} us"]
        for lane in lanes:
            row = [" "] * width
            for span in self.spans:
                if span.lane == lane and scale_us > 0:
                    first = int(span.start_us / scale_us * width)
                    last = max(first + 1, round(span.end_us / scale_us * width))
                    row[first:last] = _MARK[span.kind] * (min(last, width) - first)
            lines.append(f"  {chr(ord('A') + lane)} |{''.join(row)}|")
        return "\n".join(lines)


def predict(serial: Timeline, receive_us: float = 0.0) -> Timeline:
    """The interleaved timeline that a serial one (as `trace` gives it) promises.

    A wait of the serial run is taken as the flight time of its message: interleaved, the message
    flies while the other micro-batches compute, and only the rest is waited for. `receive_us` is
    what a receive costs although everything has arrived.
    """
    lanes = sorted({span.lane for span in serial.spans})
    todo = {lane: [span for span in serial.spans if span.lane == lane] for lane in lanes}
    arrival = dict.fromkeys(lanes, 0.0)
    spans: list[Span] = []
    now = 0.0

    def compute(lane: int) -> None:
        nonlocal now
        span = todo[lane].pop(0)
        spans.append(Span(lane, "compute", now, now + span.us))
        now += span.us
        arrival[lane] = now + (todo[lane][0].us if todo[lane] else 0.0)

    for lane in lanes:
        compute(lane)
    while active := [lane for lane in lanes if todo[lane]]:
        for lane in active:
            todo[lane].pop(0)
            end = max(arrival[lane], now + receive_us)
            spans.append(Span(lane, "wait", now, end))
            now = end
            compute(lane)
    return Timeline(tuple(spans))
