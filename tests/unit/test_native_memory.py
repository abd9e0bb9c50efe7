"""Memory that the native module hands out: zeroed, private, and gone when it should be."""

from __future__ import annotations

import ctypes
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep_runtime import _C


def test_host_memory_is_aligned_zeroed_and_ends_with_close() -> None:
    memory = _C.HostMemory(10_000)
    assert memory.address % 4096 == 0
    assert ctypes.string_at(memory.address, 10_000) == bytes(10_000)
    memory.close()
    memory.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = memory.address


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_memory_of_no_size_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="num_bytes"):
        _C.HostMemory(num_bytes)
    with pytest.raises(ValueError, match="num_bytes"):
        _C.ShmSegment("/ep-never", num_bytes, create=True)


def test_memory_that_no_machine_has_is_an_os_error() -> None:
    with pytest.raises(OSError, match="mapping"):
        _C.HostMemory(2**62)


@pytest.fixture
def name() -> Iterator[str]:
    """A name for shared memory that is gone after the test."""
    name = f"/ep-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm{name}").unlink(missing_ok=True)


def test_shared_memory_is_private_zeroed_and_shared(name: str) -> None:
    made = _C.ShmSegment(name, 5000, create=True)
    file = Path(f"/dev/shm{name}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ctypes.string_at(made.address, 5000) == bytes(5000)
    code = (
        "import ctypes, sys\nfrom ep_runtime import _C\n"
        f"segment = _C.ShmSegment({name!r}, 5000, create=False)\n"
        "ctypes.memmove(segment.address + 4990, b'here', 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ctypes.string_at(made.address + 4990, 4) == b"here"
    made.unlink()
    assert not file.exists()
    made.unlink()  # gone already: no error
    assert ctypes.string_at(made.address + 4990, 4) == b"here"  # mapped until close
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = made.address


def test_shared_memory_is_made_once(name: str) -> None:
    first = _C.ShmSegment(name, 4096, create=True)
    with pytest.raises(FileExistsError, match=name):
        _C.ShmSegment(name, 4096, create=True)
    assert Path(f"/dev/shm{name}").exists()  # the failure removed nothing
    first.unlink()


def test_shared_memory_that_is_not_there_or_too_small_is_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        _C.ShmSegment(name, 4096, create=False)
    small = _C.ShmSegment(name, 4096, create=True)
    with pytest.raises(ValueError, match="4096 bytes, need 8192"):
        _C.ShmSegment(name, 8192, create=False)
    small.unlink()


def test_shared_memory_that_others_can_open_is_refused(name: str) -> None:
    _C.ShmSegment(name, 4096, create=True)
    Path(f"/dev/shm{name}").chmod(0o666)
    with pytest.raises(PermissionError, match="private"):
        _C.ShmSegment(name, 4096, create=False)


def test_shared_memory_that_does_not_fit_leaves_no_name(name: str) -> None:
    with pytest.raises(OSError, match="enlarge /dev/shm"):
        _C.ShmSegment(name, 2**50, create=True)
    assert not Path(f"/dev/shm{name}").exists()


@pytest.mark.parametrize("bad", ["", "/", "/a/b", "x" * 255])
def test_names_that_are_no_shared_memory_names_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="name"):
        _C.ShmSegment(bad, 4096, create=True)
