"""Benchmarks: correctness first, then replays of a graph, slowest rank, peers in the same run."""

# What each command of `ep-runtime bench` and `python -m ep_runtime.bench` is, for their helps.
COMMANDS = {
    "low-latency": "Dispatch and combine at decode sizes, beside every peer that is installed:"
    " checked, then timed.",
    "normal": "Dispatch and combine at prefill sizes, over numbers of SMs, beside its peers:"
    " checked, then timed.",
    "link": "What a plain copy between two GPUs reaches.",
    "compare": "Two result files side by side.",
}
