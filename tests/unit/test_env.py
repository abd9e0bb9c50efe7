"""Environment variables are parsed once, with a clear word about what is wrong."""

from __future__ import annotations

import os

import pytest

from ep_runtime import env
from ep_runtime.env import Env
from ep_runtime.errors import ConfigError


def test_nothing_set_gives_the_defaults() -> None:
    assert env.read({}) == Env()
    assert (Env().timeout_s, Env().warmup_timeout_s) == (10.0, 60.0)
    assert (Env().memory, Env().pdl, Env().num_sms) == ("auto", True, 0)


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_empty_and_blank_count_as_unset() -> None:
    assert env.read({"EP_TIMEOUT_S": "", "RANK": " "}) == Env()


def test_values_are_parsed() -> None:
    read = env.read({"EP_TIMEOUT_S": "2.5", "EP_PDL": "0", "EP_MEMORY": "IPC", "RANK": "3"})
    assert (read.timeout_s, read.pdl, read.memory, read.rank) == (2.5, False, "ipc", 3)


@pytest.mark.parametrize(
    ("name", "text", "takes"),
    [
        ("EP_TIMEOUT_S", "0", "0.001 to 86400"),
        ("EP_TIMEOUT_S", "nan", "0.001 to 86400"),
        ("EP_TIMEOUT_S", "soon", "0.001 to 86400"),
        ("EP_PDL", "yes", "0 or 1"),
        ("EP_MEMORY", "shm", "auto, nvshmem, ipc"),
        ("EP_NUM_SMS", "-1", "0 to 1024"),
        ("WORLD_SIZE", "0", "1 to 65536"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "33", "1 to 32"),
    ],
)
def test_a_bad_value_is_named_with_what_the_variable_takes(
    name: str, text: str, takes: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        env.read({**PLACE, name: text})
    assert f"{name}={text!r}" in str(raised.value)
    assert takes in str(raised.value)


def test_torchrun_is_recognised_by_all_four_of_its_variables() -> None:
    assert env.read(PLACE).under_torchrun
    for missing in PLACE:
        assert not env.read({k: v for k, v in PLACE.items() if k != missing}).under_torchrun


@pytest.mark.parametrize(
    "others", [{"MASTER_PORT": "tcp://10.0.0.1:29500"}, {"LOCAL_RANK": "-1"}, {"RANK": "first"}]
)
def test_without_a_launcher_its_variables_may_be_of_others(others: dict[str, str]) -> None:
    assert env.read(others) == Env()


def test_a_default_for_another_library_yields_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_PROBE", "theirs")
    assert env.set_default("NVSHMEM_PROBE", "ours") == "theirs"
    monkeypatch.delenv("NVSHMEM_PROBE")
    assert env.set_default("NVSHMEM_PROBE", "ours") == "ours"


def test_a_directory_goes_first_in_a_search_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_PATH", raising=False)
    assert env.prepend_path("SOME_PATH", "/a") == "/a"
    assert env.prepend_path("SOME_PATH", "/b") == f"/b{os.pathsep}/a"
    assert env.prepend_path("SOME_PATH", "/a") == f"/b{os.pathsep}/a"
    monkeypatch.delenv("SOME_PATH")


def test_every_variable_is_documented_once() -> None:
    names = [name for name, _, _ in env.documentation()]
    assert len(names) == len(set(names)) == len(Env.__dataclass_fields__)
    assert all(meaning for _, _, meaning in env.documentation())


def test_defaults_for_other_processes_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_TIMEOUT_S", "3")
    monkeypatch.delenv("EP_MEMORY", raising=False)

    def fail_inside() -> None:
        with env.defaults({"EP_TIMEOUT_S": "9", "EP_MEMORY": "ipc"}):
            assert (env.read().timeout_s, env.read().memory) == (3.0, "ipc")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert (env.read().timeout_s, env.read().memory) == (3.0, "auto")
