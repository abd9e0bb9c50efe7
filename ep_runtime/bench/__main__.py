"""`python -m ep_runtime.bench low-latency|normal|link|compare ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ep_runtime.bench import compare, link, low_latency, normal
from ep_runtime.bench.arguments import parse_link, parse_low_latency, parse_normal
from ep_runtime.errors import EpError

USAGE = """usage: python -m ep_runtime.bench low-latency [--help] [options]
       python -m ep_runtime.bench normal [--help] [options]
       python -m ep_runtime.bench link [--help] [options]
       python -m ep_runtime.bench compare OLD.json NEW.json"""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that `argv` names. Returns the exit status: 2 for a wrong command."""
    name, rest = (argv[0], argv[1:]) if argv else ("", ())
    try:
        if name == "low-latency":
            return low_latency.main(parse_low_latency(rest))
        if name == "normal":
            return normal.main(parse_normal(rest))
        if name == "link":
            return link.main(parse_link(rest))
        if name == "compare" and len(rest) == 2:
            return compare.main(Path(rest[0]), Path(rest[1]))
    except EpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(USAGE, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
