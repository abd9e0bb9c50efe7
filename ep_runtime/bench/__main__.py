"""`python -m ep_runtime.bench low-latency|link [options]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ep_runtime.bench import link, low_latency
from ep_runtime.bench.arguments import parse_link, parse_low_latency
from ep_runtime.errors import EpError

USAGE = "usage: python -m ep_runtime.bench {low-latency,link} [--help] [options]"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that `argv` names. Returns the exit status: 2 for a wrong command."""
    name, rest = (argv[0], argv[1:]) if argv else ("", ())
    try:
        if name == "low-latency":
            return low_latency.main(parse_low_latency(rest))
        if name == "link":
            return link.main(parse_link(rest))
    except EpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(USAGE, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
