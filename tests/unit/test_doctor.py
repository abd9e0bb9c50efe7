"""doctor on machines of several kinds, made of what the probes ask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ep_runtime import doctor
from ep_runtime.doctor import Finding


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch report so many GPUs that all reach each other."""

    def pretend(count: int, major: int = 9) -> None:
        properties = SimpleNamespace(
            name="NVIDIA", major=major, minor=0, multi_processor_count=132, total_memory=80 << 30
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: i != j)

    return pretend


def pretend_build(monkeypatch: pytest.MonkeyPatch, *, has_cuda: bool, archs: str) -> None:
    module = SimpleNamespace(has_cuda=has_cuda, cuda_archs=archs, build_info="a test")
    monkeypatch.setitem(sys.modules, "ep_runtime._C", module)


def test_every_finding_is_complete_on_this_machine() -> None:
    findings = doctor.examine()
    assert len(findings) >= len(doctor.PROBES)
    assert not [f for f in findings if "could not be examined" in f.value]
    assert all(f.name and f.value for f in findings)
    assert all(f.advice for f in findings if f.status == "problem")


def test_a_probe_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe_the_unexpected() -> Iterator[Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", (probe_the_unexpected,))
    (finding,) = doctor.examine()
    assert (finding.name, finding.status) == ("the unexpected", "problem")
    assert "no such thing" in finding.value


@pytest.mark.parametrize("has_method", [True, False])
def test_a_torch_whose_graphs_cannot_be_uploaded_is_noted(
    monkeypatch: pytest.MonkeyPatch, has_method: bool
) -> None:
    members = {"raw_cuda_graph_exec": None} if has_method else {}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), members))
    (finding,) = doctor.probe_python()
    assert finding.status == ("ok" if has_method else "note")
    assert ("graphs on GPUs" in finding.advice) is not has_method


def test_without_a_gpu_only_cpu_ranks_run(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)
    pretend_build(monkeypatch, has_cuda=True, archs="90")
    assert [f.status for f in doctor.abilities()] == ["ok", "missing", "missing"]


def test_one_gpu_runs_virtual_ranks_and_two_run_processes(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_build(monkeypatch, has_cuda=True, archs="90")
    gpus(1)
    assert [f.status for f in doctor.abilities()] == ["ok", "ok", "missing"]
    gpus(2)
    assert [f.status for f in doctor.abilities()] == ["ok", "ok", "ok"]


def test_gpus_do_not_help_a_build_without_cuda(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(8)
    pretend_build(monkeypatch, has_cuda=False, archs="")
    assert [f.status for f in doctor.abilities()] == ["ok", "missing", "missing"]
    finding = only(doctor.probe_native_module())
    assert finding.status == "note"
    assert "nvcc" in finding.advice


def test_a_missing_native_module_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ep_runtime._C", None)
    finding = only(doctor.probe_native_module())
    assert finding.status == "problem"
    assert "make build" in finding.advice
    assert {f.status for f in doctor.abilities()} == {"problem"}


def test_a_gpu_older_than_the_build_is_a_problem(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    pretend_build(monkeypatch, has_cuda=True, archs="100")
    finding = only(doctor.probe_GPUs())
    assert finding.status == "problem"
    assert "EP_CUDA_ARCHS=90" in finding.advice


def test_a_gpu_older_than_hopper_is_not_supported(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1, major=8)
    pretend_build(monkeypatch, has_cuda=True, archs="90")
    finding = only(doctor.probe_GPUs())
    assert finding.status == "problem"
    assert "sm_80" in finding.value
    assert "not supported" in finding.value
    assert "--backend host" in finding.advice
    assert "EP_CUDA_ARCHS" not in finding.advice
    assert [f.status for f in doctor.abilities()] == ["ok", "missing", "missing"]


@pytest.mark.parametrize(("device", "advice"), [(False, ""), (True, "unset CUDA_VISIBLE_DEVICES")])
def test_hidden_gpus_are_suspected_only_where_there_is_a_device(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: bool, advice: str
) -> None:
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "_has_gpu_device", lambda: device)
    assert only(doctor.probe_GPUs()).advice == ""  # an empty variable reads as unset
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert only(doctor.probe_GPUs()).advice == advice


@pytest.mark.parametrize(("wheel", "installs"), [(None, True), ("3.6.1", False)])
def test_a_wheel_is_advised_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, wheel: str | None, installs: bool
) -> None:
    monkeypatch.setitem(sys.modules, "ep_runtime._nvshmem", None)
    monkeypatch.setattr(doctor, "_version", lambda _: wheel)
    finding = only(doctor.probe_NVSHMEM())
    assert ("pip install 'nvidia-nvshmem-cu13>=3.4.5,<4'" in finding.advice) == installs
    assert "make clean build" in finding.advice


def test_pairs_without_peer_access_are_named(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(3)
    assert only(doctor.probe_peer_access()).status == "ok"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: 2 not in (i, j))
    finding = only(doctor.probe_peer_access())
    assert finding.status == "problem"
    assert finding.value == "-yn y-n nn-"


TOPOLOGY = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \t{link}\tSYS\t0-31
GPU1\t{link}\t X \tSYS\t0-31
NIC0\tSYS\tSYS\t X
"""


@pytest.mark.parametrize(
    ("link", "status", "value"),
    [("NV18", "ok", "every pair (NV18)"), ("PHB", "note", "pairs linked by PHB")],
)
def test_nvlink_is_read_from_the_topology(
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    link: str,
    status: str,
    value: str,
) -> None:
    gpus(2)
    monkeypatch.setattr(doctor, "_output", lambda *_: TOPOLOGY.format(link=link))
    finding = only(doctor.probe_NVLink())
    assert (finding.status, finding.value) == (status, value)


def test_an_unreadable_topology_is_unknown_not_absent(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    monkeypatch.setattr(doctor, "_output", lambda *_: None)
    assert only(doctor.probe_NVLink()).value.startswith("unknown")


@pytest.mark.parametrize(
    ("setting", "status"), [(None, "ok"), ("1", "problem"), ("2", "problem"), ("8", "ok")]
)
def test_few_hardware_queues_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, status: str
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", setting)
    assert only(doctor.probe_hardware_queues()).status == status


@pytest.mark.parametrize(
    ("loaded", "status"),
    [((3, 4, 5), "ok"), ((3, 8, 0), "ok"), ((3, 3, 9), "problem"), ((4, 0, 0), "problem")],
)
def test_an_nvshmem_library_older_than_the_build_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, loaded: tuple[int, int, int], status: str
) -> None:
    module = SimpleNamespace(built_against=(3, 4, 5), version=lambda: loaded)
    monkeypatch.setitem(sys.modules, "ep_runtime._nvshmem", module)
    assert only(doctor.probe_NVSHMEM()).status == status


def test_an_mps_daemon_is_found_by_its_control_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert only(doctor.probe_MPS()).status == "missing"
    (tmp_path / "control").touch()
    assert only(doctor.probe_MPS()).status == "note"


def test_little_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = SimpleNamespace(f_blocks=64 << 20, f_bavail=60 << 20, f_frsize=1)
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: stat)
    finding = only(doctor.probe_shared_memory())
    assert finding.status == "problem"
    assert "--shm-size" in finding.advice
