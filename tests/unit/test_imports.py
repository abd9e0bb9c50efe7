"""The package's layers, and what its hot modules must not do. Reads sources, imports nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

# The order of docs/architecture.md; a module may import from its own layer and those before it.
# Modules that the document does not name stand with the part they belong to.
LAYERS = (
    {"_C"},
    {"errors", "env", "config", "current", "logs", "native", "overlap"},
    {"world", "launch"},
    {"memory"},
    {"layout"},
    {"ops", "faults", "handles", "masks", "order", "receive", "validate"},
    {"buffer", "call_order", "connect", "member", "pending", "rank", "virtual"},
    {"normal"},
    {"graphs"},
    {"scheduler"},
    {"lm", "bench", "integrations", "reference", "reference_wire"},
    {"cli", "cli_bench", "cli_tables", "decoding", "doctor", "__main__"},
)
# Alternatives: neither knows of the other.
APART = ({"lm", "bench"}, {"lm", "integrations"}, {"doctor", "lm"}, {"doctor", "bench"})
# The package itself: names are loaded on first use, so it may name everything.
LAZY = "__init__"


def sources() -> dict[str, Path]:
    """Module name -> file, as the package is laid out when it is installed."""
    found: dict[str, Path] = {}
    for name, directory in (
        ("ep_runtime", CHECKOUT / "ep_runtime"),
        ("ep_runtime.graphs", CHECKOUT / "graphs"),
        ("ep_runtime.integrations", CHECKOUT / "integrations"),
    ):
        for file in sorted(directory.rglob("*.py")):
            parts = file.relative_to(directory).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([name, *parts])] = file
    return found


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node but the bodies of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def imports_of(file: Path, known: set[str]) -> set[str]:
    """The modules of this package that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if [alias.name for alias in node.names] == ["__version__"]:
                continue
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` is an import of the module alone.
            names |= {n for n in below if n in known or n == "ep_runtime._C"} or {node.module}
    return {n for n in names if n.split(".")[0] == "ep_runtime"}


SOURCES = sources()
IMPORTS = {name: imports_of(file, set(SOURCES)) for name, file in SOURCES.items()}


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else LAZY


def layer_of(part: str) -> int:
    for index, names in enumerate(LAYERS):
        if part in names:
            return index
    pytest.fail(f"ep_runtime.{part} is in no layer: add it to LAYERS where it belongs")


@pytest.mark.parametrize("module", [m for m in SOURCES if part_of(m) != LAZY])
def test_a_module_imports_only_from_its_own_layer_and_those_before(module: str) -> None:
    own = part_of(module)
    for imported in IMPORTS[module]:
        other = part_of(imported)
        assert other != LAZY, f"{module} imports the package itself; import the module it needs"
        assert layer_of(other) <= layer_of(own), f"{module} imports {imported} of a later layer"
        assert {own, other} not in APART, f"{module} imports {imported}, its sibling"


def test_no_module_takes_part_in_an_import_cycle() -> None:
    graph = {module: names - {module} for module, names in IMPORTS.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_the_layers_are_those_of_the_architecture_document() -> None:
    text = (CHECKOUT / "docs" / "architecture.md").read_text()
    paragraph = text.split("Imports go one way")[1].split("\n\n")[0]
    order = paragraph.partition(":")[2]
    named = [set(re.findall(r"\w+", step)) for step in order.split("->")]
    assert len(named) == len(LAYERS)
    for written, layer in zip(named, LAYERS, strict=True):
        assert written <= layer


HOT_PARTS = (
    "ops",
    "buffer",
    "graphs",
    "scheduler",
    "memory",
    "member",
    "pending",
    "rank",
    "virtual",
    "normal",
)
HOT = [m for m in SOURCES if part_of(m) in HOT_PARTS]


def attributes(node: ast.AST, function: str = "") -> Iterator[tuple[int, str, str]]:
    """(line, dotted name, enclosing function) of every attribute in code; not in texts."""
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.Attribute):
        yield node.lineno, ast.unparse(node), function
    for child in ast.iter_child_nodes(node):
        yield from attributes(child, function)


def attributes_of(module: str) -> Iterator[tuple[str, str, str]]:
    """(where, dotted name, enclosing function)"""
    file = SOURCES[module]
    for line, name, function in attributes(ast.parse(file.read_text())):
        yield f"{file.relative_to(CHECKOUT)}:{line}: {name}", name, function


@pytest.mark.parametrize("module", HOT)
def test_hot_modules_do_not_read_tensors_on_the_host(module: str) -> None:
    for where, name, _ in attributes_of(module):
        assert not name.endswith((".item", ".tolist", ".numpy")), where


@pytest.mark.parametrize("module", HOT)
def test_hot_modules_synchronise_only_in_functions_named_so(module: str) -> None:
    """So that whoever reads a caller sees it."""
    for where, name, function in attributes_of(module):
        assert name != "torch.cuda.synchronize" or function == "synchronize", where


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"ep_runtime.env"}))
def test_only_env_reads_the_environment(module: str) -> None:
    for where, name, _ in attributes_of(module):
        assert name not in ("os.environ", "os.getenv", "os.putenv"), (
            f"{where}; add a field to ep_runtime/env.py"
        )
