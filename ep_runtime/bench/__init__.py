"""Benchmarks: correctness first, then replays of a graph, slowest rank, peers in the same run."""
