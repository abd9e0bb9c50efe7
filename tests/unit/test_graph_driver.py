"""The calls into cuda-python exist in the installed version; what they do needs a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from ep_runtime.errors import BuildError, CudaError
from ep_runtime.graphs import driver
from ep_runtime.graphs import nodes as gn

bindings: Any = pytest.importorskip(
    "cuda.bindings.driver", reason="cuda-bindings is not installed: pip install 'cuda-bindings<14'"
)


@pytest.mark.parametrize("name", driver.CALLS)
def test_cuda_python_has_every_call(name: str) -> None:
    assert callable(getattr(bindings, name))


def test_no_call_is_made_that_is_not_listed() -> None:
    source = inspect.getsource(driver)
    for name in dir(bindings):
        if name.startswith("cu") and (f'"{name}"' in source or f"driver.{name}(" in source):
            assert name in driver.CALLS


def test_graph_kinds_exist_in_cuda_python() -> None:
    known = {kind.name for kind in bindings.CUgraphNodeType}
    assert set(driver._KINDS) <= known
    assert set(driver._KINDS.values()) == {
        gn.KERNEL, gn.MEMCPY, gn.MEMSET, gn.HOST, gn.CHILD, gn.EMPTY, gn.WAIT_EVENT,
        gn.RECORD_EVENT, gn.MEM_ALLOC, gn.MEM_FREE, gn.CONDITIONAL,
    }  # fmt: skip


def test_memory_kinds_are_those_of_cuda() -> None:
    types = bindings.CUmemorytype
    assert driver._MEMORY[int(types.CU_MEMORYTYPE_HOST)] == "host"
    assert driver._MEMORY[int(types.CU_MEMORYTYPE_DEVICE)] == "device"
    assert driver._MEMORY[int(types.CU_MEMORYTYPE_ARRAY)] == "array"
    assert int(types.CU_MEMORYTYPE_UNIFIED) == driver._UNIFIED


def test_programmatic_is_the_edge_type_of_cuda() -> None:
    kind = bindings.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    assert int(kind) == 1
    assert driver._number(bindings.CUgraphEdgeData().type) == 0
    assert driver._number(b"\x01") == 1


def test_a_graph_handle_keeps_its_address() -> None:
    assert int(driver.graph_handle(0x7F00)) == 0x7F00


def test_a_missing_call_names_the_remedy() -> None:
    with pytest.raises(BuildError, match="cuda-bindings>=13"):
        driver.call("cuGraphDoesNotExist")


def test_a_failing_call_names_itself_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        __name__ = "fake"

        @staticmethod
        def cuGraphUpload() -> tuple[int]:  # noqa: N802
            return (1,)

        @staticmethod
        def cuGetErrorString(status: int) -> tuple[int, bytes]:  # noqa: N802
            return 0, b"invalid argument" if status == 1 else b"?"

    monkeypatch.setattr(driver, "bindings", Fake)
    with pytest.raises(CudaError, match="cuGraphUpload failed with 1: invalid argument"):
        driver.call("cuGraphUpload")
