"""NVSHMEM: its host API, and puts between nodes. One world per process.

Every function that fails raises RuntimeError.
"""

from typing import Final

built_against: Final[tuple[int, int, int]]

def get_unique_id() -> bytes:
    """128 bytes that all ranks of a new world pass to init(). Works without a GPU."""

def init(rank: int, num_ranks: int, unique_id: bytes, device: int) -> None:
    """Collective. Makes `device` the current CUDA device first."""

def malloc(num_bytes: int) -> int:
    """Collective, with equal sizes on all ranks of the world. Address of this rank's part."""

def free(address: int) -> None:
    """Collective."""

def peer_address(address: int, peer: int) -> int:
    """Where this GPU sees the peer's part of an allocation; 0 if it cannot address it."""

def barrier_all() -> None:
    """Collective; waits for all ranks of the world, without a time limit."""

def attach_kernels(rank: int, num_ranks: int, unique_id: bytes) -> None:
    """Collective, behind init() and with its arguments: this module's kernels may put."""

def announce(*arguments: int) -> None:
    """A rank's counts to all ranks. The leading seven of RegionShape.native; addresses of the
    region, the counters and the abort word; then the arguments of CudaWire.announce. Capturable."""

def put(*arguments: int) -> None:
    """Rows to the rail's ranks: as announce, then the arguments of CudaWire.put. Capturable."""

def finalize() -> None:
    """Collective; does nothing when init() has not succeeded in this process."""

def version() -> tuple[int, int, int]:
    """(major, minor, patch) of the loaded library; its minor may be newer than built_against."""

def init_status() -> int:
    """0 not initialized, 1 bootstrapped, 2 initialized, 3 limited and 4 full ranks-per-GPU mode."""
