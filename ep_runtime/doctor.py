"""What this machine can run, and what to do about the rest.

Every probe answers on every machine: one that fails is itself a finding.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from ep_runtime import env

Status = Literal["ok", "note", "missing", "problem"]

SMALL_SHM_BYTES = 256 << 20  # less than this is a container's default, too little for many ranks
COMMAND_TIMEOUT_S = 20.0
OLDEST_GPU = 9  # major number of the compute capability that the kernels are written for


@dataclass(frozen=True, slots=True)
class Finding:
    """ok: works. note: works, worth knowing. missing: optional and absent. problem: act on it.

    `advice` says what to do; empty where there is nothing to do.
    """

    name: str
    status: Status
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings, in the order a reader wants them."""
    findings: list[Finding] = []
    for probe in PROBES:
        name = probe.__name__.removeprefix("probe_").replace("_", " ")
        try:
            findings.extend(probe())
        except Exception as error:  # noqa: BLE001 - doctor must answer on every machine
            value = f"could not be examined: {type(error).__name__}: {error}"
            findings.append(Finding(name, "problem", value, "please report this"))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _num_supported_gpus() -> int:
    import torch

    each = map(torch.cuda.get_device_properties, range(_num_gpus()))
    return sum(p.major >= OLDEST_GPU for p in each)


def _has_cuda_build() -> bool:
    return bool(importlib.import_module("ep_runtime._C").has_cuda)


def probe_python() -> Iterator[Finding]:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    value = f"Python {platform.python_version()}, torch {torch.__version__} ({built_for})"
    if _has_gpu_device() and not torch.version.cuda:
        advice = "this machine has an NVIDIA GPU: install a torch built for CUDA"
        yield Finding("python", "problem", value, advice)
    elif torch.version.cuda and not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
        advice = "eager calls work; graphs on GPUs need a newer torch (2.11 is tested)"
        yield Finding("python", "note", value, advice)
    else:
        yield Finding("python", "ok", value)


def _has_gpu_device() -> bool:
    return Path("/dev/nvidiactl").exists()


def probe_native_module() -> Iterator[Finding]:
    name = "native module"
    try:
        module = importlib.import_module("ep_runtime._C")
    except ImportError as error:
        yield Finding(name, "problem", str(error), "build it: `make build` or `pip install -e .`")
        return
    if module.has_cuda:
        value = f"host and CUDA backends, for sm_{module.cuda_archs.replace(',', ', sm_')}"
        yield Finding(name, "ok", f"{value}; {module.build_info}")
    else:
        advice = (
            "for GPUs: put nvcc on the PATH, or set EP_NVCC or CUDA_HOME, then `make clean build`"
        )
        yield Finding(name, "note", f"host backend alone; {module.build_info}", advice)


def probe_driver() -> Iterator[Finding]:
    version = Path("/proc/driver/nvidia/version")
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if text and text.strip():
        yield Finding("driver", "ok", text.split()[0])
    elif version.exists():
        yield Finding("driver", "ok", version.read_text().splitlines()[0])
    elif _has_gpu_device():
        advice = "install the NVIDIA driver, or give the container access (--gpus all)"
        yield Finding("driver", "problem", "a GPU device without a driver that answers", advice)
    else:
        advice = "nothing to do: CPU ranks work (--backend host)"
        yield Finding("driver", "missing", "no NVIDIA driver", advice)


def probe_GPUs() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    import torch

    count = _num_gpus()
    if count == 0:
        shown = env.read().cuda_visible_devices
        value = "none that torch can use"
        if shown is not None:
            value += f" (CUDA_VISIBLE_DEVICES={shown!r})"
        hidden = shown is not None and _has_gpu_device()
        advice = "unset CUDA_VISIBLE_DEVICES" if hidden else ""
        yield Finding("GPUs", "missing", value, advice)
    archs = [a for a in importlib.import_module("ep_runtime._C").cuda_archs.split(",") if a]
    for index in range(count):
        p = torch.cuda.get_device_properties(index)
        value = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
        lowest = min((int("".join(filter(str.isdigit, a))) for a in archs), default=0)
        if p.major < OLDEST_GPU:
            value += f"; not supported, kernels need sm_{OLDEST_GPU}0 or newer"
            yield Finding(f"GPU {index}", "problem", value, "use --backend host: CPU ranks work")
        elif archs and p.major * 10 + p.minor < lowest:
            advice = f"this build is for sm_{lowest} and newer: EP_CUDA_ARCHS={p.major}{p.minor}"
            yield Finding(f"GPU {index}", "problem", value, f"{advice} make clean build")
        else:
            yield Finding(f"GPU {index}", "ok", value)


def probe_peer_access() -> Iterator[Finding]:
    import torch

    count = _num_gpus()
    if count < 2:
        advice = "" if count == 0 else "several ranks can share this GPU: virtual_ranks(...)"
        yield Finding("peer access", "missing", f"needs 2 GPUs, {count} here", advice)
        return
    rows = [
        "".join(
            "-" if i == j else "y" if torch.cuda.can_device_access_peer(i, j) else "n"
            for j in range(count)
        )
        for i in range(count)
    ]
    if any("n" in row for row in rows):
        advice = "use GPUs that reach each other (CUDA_VISIBLE_DEVICES); n marks pairs that do not"
        yield Finding("peer access", "problem", " ".join(rows), advice)
    else:
        yield Finding("peer access", "ok", f"all {count} GPUs reach each other")


def probe_NVLink() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    count = _num_gpus()
    if count < 2:
        yield Finding("NVLink", "missing", f"needs 2 GPUs, {count} here")
        return
    text = _output("nvidia-smi", "topo", "-m") or ""
    rows = [line.split()[1 : count + 1] for line in text.splitlines() if line.startswith("GPU")]
    cells = {cell for row in rows for cell in row if cell != "X"}
    if not cells:
        yield Finding("NVLink", "note", "unknown: `nvidia-smi topo -m` shows no GPU pairs")
    elif all(cell.startswith("NV") for cell in cells):
        yield Finding("NVLink", "ok", f"every pair ({', '.join(sorted(cells))})")
    else:
        advice = "kernels run over PCIe as well where peers reach each other, but slower"
        yield Finding("NVLink", "note", f"pairs linked by {', '.join(sorted(cells))}", advice)


def probe_NVSHMEM() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    wheel = _version("nvidia-nvshmem-cu13")
    try:
        module = importlib.import_module("ep_runtime._nvshmem")
    except ImportError as error:
        value = f"extension not usable ({error}); wheel {wheel or 'not installed'}"
        install = "pip install 'nvidia-nvshmem-cu13>=3.4.5,<4', then " if wheel is None else ""
        advice = f"optional: {install}`make clean build`; CUDA IPC is used without it"
        yield Finding("NVSHMEM", "missing", value, advice)
        return
    built, loaded = module.built_against, module.version()
    value = f"{_dotted(loaded)} loaded, built against {_dotted(built)}, wheel {wheel}"
    if loaded[0] != built[0] or loaded[1] < built[1]:
        advice = "the loaded library is too old: `make clean build`, or set EP_MEMORY=ipc"
        yield Finding("NVSHMEM", "problem", value, advice)
    else:
        yield Finding("NVSHMEM", "ok", value)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def probe_NCCL() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    import torch

    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Finding("NCCL", "ok", _dotted(version))
    else:
        advice = "only benchmarks compare with it; it comes with a torch built for CUDA"
        yield Finding("NCCL", "missing", "not in this torch", advice)


def probe_cuda_bindings() -> Iterator[Finding]:
    version = _version("cuda-bindings")
    if version is not None:
        yield Finding("cuda-bindings", "ok", version)
    else:
        status: Status = "problem" if _num_gpus() and _has_cuda_build() else "missing"
        advice = "graphs on a GPU need it: pip install 'cuda-bindings>=13,<14'"
        yield Finding("cuda-bindings", status, "not installed", advice)


def probe_hardware_queues() -> Iterator[Finding]:
    value = env.read().cuda_device_max_connections
    name = env.variable("cuda_device_max_connections")
    if value is None:
        yield Finding(name, "ok", "unset: CUDA's default of 8")
    elif value < 3:
        advice = "unset it, or set 8 or more: parallel branches of an overlapped graph wait in line"
        yield Finding(name, "problem", str(value), advice)
    else:
        yield Finding(name, "ok", str(value))


def probe_RDMA_devices() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    root = Path("/sys/class/infiniband")
    devices = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    if devices:
        states = {d: _port_states(root / d) for d in devices}
        yield Finding("RDMA devices", "ok", ", ".join(f"{d} ({s})" for d, s in states.items()))
    else:
        advice = "only groups that span several machines need one"
        yield Finding("RDMA devices", "missing", "none", advice)


def _port_states(device: Path) -> str:
    files = sorted(device.glob("ports/*/state"))
    return ", ".join(f.read_text().split(":")[-1].strip().lower() for f in files) or "no ports"


def probe_MPS() -> Iterator[Finding]:  # noqa: N802 - the name is shown
    directory = Path(env.read().cuda_mps_pipe_directory or "/tmp/nvidia-mps")
    if (directory / "control").exists():
        advice = "give each rank that shares a GPU its part: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
        yield Finding("MPS", "note", f"a daemon listens in {directory}", advice)
    else:
        advice = "only several processes on one GPU need it: nvidia-cuda-mps-control -d"
        yield Finding("MPS", "missing", "no daemon", advice if _num_gpus() else "")


def probe_shared_memory() -> Iterator[Finding]:
    stat = os.statvfs("/dev/shm")
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    value = f"/dev/shm {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    if free < SMALL_SHM_BYTES:
        advice = "host ranks keep their heaps there: start the container with --shm-size=2g"
        yield Finding("shared memory", "problem", value, advice)
    else:
        yield Finding("shared memory", "ok", value)


PROBES: tuple[Callable[[], Iterator[Finding]], ...] = (
    probe_python,
    probe_native_module,
    probe_driver,
    probe_GPUs,
    probe_peer_access,
    probe_NVLink,
    probe_NVSHMEM,
    probe_NCCL,
    probe_cuda_bindings,
    probe_hardware_queues,
    probe_RDMA_devices,
    probe_MPS,
    probe_shared_memory,
)


def abilities() -> list[Finding]:
    """The three ways to run ranks, and whether this machine can."""
    try:
        cuda = _has_cuda_build()
    except ImportError:
        why = "ep_runtime._C is not built, or does not load"
        names = ("CPU ranks", "virtual GPU ranks", "one process per GPU")
        return [Finding(name, "problem", why, "`make build`") for name in names]
    gpus = _num_supported_gpus() if cuda else 0
    why = "no usable GPU" if cuda else "this build holds no CUDA backend"
    virtual = Finding("virtual GPU ranks", "missing", why)
    processes = Finding("one process per GPU", "missing", why)
    if gpus:
        virtual = Finding("virtual GPU ranks", "ok", f"on {gpus} GPUs, any number of ranks")
        enough = gpus >= 2
        value = f"up to {gpus} ranks" if enough else "needs 2 GPUs, 1 here"
        processes = Finding("one process per GPU", "ok" if enough else "missing", value)
    cpu = Finding("CPU ranks", "ok", f"as processes or threads, {os.cpu_count()} cores")
    return [cpu, virtual, processes]
