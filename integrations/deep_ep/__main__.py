"""python -m ep_runtime.integrations.deep_ep [-m MODULE | SCRIPT] ARGS

Runs a program that imports deep_ep, unchanged, on ep_runtime.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ep_runtime import logs
from ep_runtime.integrations.deep_ep.install import install, install_for_children

USAGE = """\
usage: python -m ep_runtime.integrations.deep_ep SCRIPT [ARGS ...]
       python -m ep_runtime.integrations.deep_ep -m MODULE [ARGS ...]

Runs the program with `import deep_ep` answered by ep_runtime, in this process and in the Python
processes that it starts."""


def main(arguments: list[str]) -> int:
    """Run the program as __main__; 2 if none was named."""
    as_module = arguments[:1] == ["-m"]
    program = arguments[as_module:]
    if not program or (program[0].startswith("-") and not as_module):
        asked = program[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    install()
    install_for_children()
    logs.start()
    sys.argv = program
    if as_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return 0
    if not Path(program[0]).exists():
        print(f"{program[0]}: no such file\n\n{USAGE}", file=sys.stderr)
        return 2
    sys.path.insert(1, str(Path(program[0]).resolve().parent))  # behind install()'s directory
    runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
