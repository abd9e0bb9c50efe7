"""The command line: what each command makes of its options, and how it fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ep_runtime import cli, decoding, env
from ep_runtime.bench import low_latency
from ep_runtime.bench.arguments import link_parser, low_latency_parser, normal_parser
from ep_runtime.bench.options import LowLatencyOptions
from ep_runtime.decoding import DecodeResult, Plan
from ep_runtime.doctor import Finding
from ep_runtime.errors import BuildError, ConfigError
from ep_runtime.lm.check import CheckReport
from ep_runtime.lm.decode import DecodedSequence, DecodeReport
from ep_runtime.lm.job import DecodeJob

run = CliRunner().invoke


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "ep_runtime", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60)


def test_help_loads_neither_torch_nor_the_native_module() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from ep_runtime import cli\n"
        "assert CliRunner().invoke(cli.app, ['decode', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ep_runtime._C') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def helps(command: Any) -> dict[str, str]:
    """Help text by flag, of a command and those below it."""
    found = {f"{command.name} {param.opts[0]}": param.help or "" for param in command.params}
    for below in getattr(command, "commands", {}).values():
        found |= helps(below)
    return found


def test_every_option_of_every_command_says_what_it_means() -> None:
    told = helps(get_command(cli.app))
    for parser in (low_latency_parser(), normal_parser(), link_parser()):
        for action in parser._actions:
            told[f"{parser.prog} {action.option_strings[-1]}"] = action.help or ""
    assert {"decode --wire", "python -m ep_runtime.bench normal --sms"} <= told.keys()
    # What a benchmark's option means stands before its default, which alone is no help.
    silent = [name for name, text in told.items() if not text.partition("default:")[0].strip(" [")]
    assert silent == []


def test_an_error_of_ours_is_one_line_and_status_1() -> None:
    done = command("decode", "--backend", "host", "--ranks", "0")
    assert done.returncode == 1
    assert done.stderr == "ep-runtime: ConfigError: ranks=0: it must be at least 1\n"


def test_an_unknown_option_is_status_2() -> None:
    assert command("decode", "--nonsense").returncode == 2


def test_info_names_build_limits_and_every_variable() -> None:
    text = run(cli.app, ["info"]).stdout
    assert "max_ranks" in text
    for name, _, _ in env.documentation():
        assert name in text


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_prints_json() -> None:
    done = run(cli.app, ["doctor", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["abilities"][0]["name"] == "CPU ranks"
    assert {"name", "status", "value", "advice"} == set(told["findings"][0])


def test_doctor_speaks_whatever_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
        assert json.loads(run(cli.app, ["doctor", "--json"]).stdout)["abilities"]


def test_doctor_fails_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [Finding("CPU ranks", "problem", "not built", "make build")]
    monkeypatch.setattr("ep_runtime.doctor.abilities", lambda: broken)
    done = run(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert "make build" in done.stdout


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_are_options_then_lines_that_are_not_blank(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  \nsecond\n")
    assert cli.read_prompts(["zero"], file) == ("zero", "first", "second")


def test_prompts_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert cli.read_prompts([], Path("-")) == ("from a pipe",)


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe\x00"])
def test_a_prompt_file_that_is_missing_empty_or_no_text_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts\.txt"):
        cli.read_prompts([], file)


# ---- decode -------------------------------------------------------------------------------------


def report(text: bytes, check: CheckReport | None = None) -> DecodeReport:
    return DecodeReport(
        sequences=(DecodedSequence(0, b"in ", text), DecodedSequence(1, b"out ", text)),
        num_ranks=4,
        backend="host",
        seconds=0.5,
        step_us=(100.0, 300.0, 200.0),
        replays={2: 3},
        launches={1: 8, 2: 8},
        bytes_dispatched=12345,
        bytes_combined=6789,
        check=check,
    )


GOOD = CheckReport(8, (), (), 0.01, 0.25)
WRONG = CheckReport(8, (), ("a token",), 1.0, 0.25)  # type: ignore[arg-type]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the ranks: gives `result` and keeps what the command asked for."""
    seen: dict[str, Any] = {"result": DecodeResult(report(b"word", GOOD), None)}

    def decode(job: DecodeJob, plan: Plan, repeat_eagerly: bool = False) -> DecodeResult:
        seen.update(job=job, plan=plan, eager=repeat_eagerly)
        result: DecodeResult = seen["result"]
        return result

    monkeypatch.setattr(decoding, "decode", decode)
    return seen


def test_decode_passes_its_options_on(decoded: dict[str, Any]) -> None:
    options = (
        "--prompt a --prompt b --ranks 2 --backend host --tokens 5 --batch 3 --microbatches 2 "
        "--wire fp8 --temperature 0.5 --seed 9 --check --eager"
    )
    decoded["result"] = DecodeResult(report(b"word", GOOD), report(b"word"))
    assert run(cli.app, ["decode", *options.split()]).exit_code == 0
    job: DecodeJob = decoded["job"]
    assert job.prompts == (b"a", b"b")
    assert (job.num_tokens, job.batch, job.microbatches) == (5, 3, 2)
    assert (job.dispatch_format, job.sampling.temperature, job.sampling.seed) == ("fp8", 0.5, 9)
    assert (job.check, job.stream, decoded["eager"]) == (True, True, True)
    assert (decoded["plan"].kind, decoded["plan"].num_ranks) == ("host", 2)


def test_decode_shows_texts_measures_and_the_check(decoded: dict[str, Any]) -> None:
    out = run(cli.app, ["decode", "--backend", "host", "--check"]).stdout
    assert "backend host, 4 ranks: processes over shared memory (asked for)" in out
    assert "out word" in out
    for shown in ("200 us", "bucket 2", "12,345 B", "6,789 B", "8 of 8 tokens equal"):
        assert shown in out


def test_decode_fails_where_a_token_is_wrong(decoded: dict[str, Any]) -> None:
    decoded["result"] = DecodeResult(report(b"word", WRONG), None)
    done = run(cli.app, ["decode", "--backend", "host", "--check"])
    assert done.exit_code == 1
    assert "1 mismatches" in done.stdout


def test_decode_fails_where_eager_and_graph_differ(decoded: dict[str, Any]) -> None:
    decoded["result"] = DecodeResult(report(b"word", GOOD), report(b"sword"))
    assert run(cli.app, ["decode", "--backend", "host", "--eager"]).exit_code == 1


def test_only_rank_0_speaks_under_torchrun(
    decoded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = run(cli.app, ["decode", "--backend", "host"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert decoded["plan"].num_ranks == 2


# ---- the plan -----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the plan see so many GPUs, with or without a CUDA build, and no torchrun."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def pretend(gpus: int, has_cuda: bool = True) -> None:
        monkeypatch.setattr(decoding.torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(decoding.torch.cuda, "device_count", lambda: gpus)

        class Module:
            build_info = "no nvcc"

        Module.has_cuda = has_cuda  # type: ignore[attr-defined]
        monkeypatch.setattr(decoding, "_C", Module)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "choice", "ranks", "kind", "num_ranks"),
    [
        (0, "auto", None, "host", 4),
        (0, "auto", 2, "host", 2),
        (2, "host", None, "host", 4),
        (1, "auto", None, "virtual", 4),
        (2, "auto", None, "cuda", 2),
        (8, "auto", None, "cuda", 8),
        (8, "auto", 4, "cuda", 4),
        (2, "auto", 8, "virtual", 8),
        (2, "cuda", None, "cuda", 2),
        (1, "cuda", 1, "cuda", 1),
        (2, "virtual", None, "virtual", 4),
    ],
)
def test_the_plan_uses_gpus_where_there_are(
    machine: Any, gpus: int, choice: str, ranks: int | None, kind: str, num_ranks: int
) -> None:
    machine(gpus)
    plan = decoding.make_plan(choice, ranks)
    assert (plan.kind, plan.num_ranks) == (kind, num_ranks)
    assert plan.reason


def test_gpus_that_the_build_cannot_use_are_explained(machine: Any) -> None:
    machine(2, has_cuda=False)
    assert "no nvcc" in decoding.make_plan("auto", None).reason
    with pytest.raises(BuildError, match="no nvcc"):
        decoding.make_plan("cuda", None)


def test_torchrun_decides_the_number_of_ranks(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert decoding.make_plan("auto", None) == decoding.make_plan("cuda", 2)
    with pytest.raises(ConfigError, match="torchrun started 2"):
        decoding.make_plan("auto", 4)
    with pytest.raises(ConfigError, match="virtual"):
        decoding.make_plan("virtual", None)


@pytest.mark.parametrize(("choice", "ranks"), [("gpu", None), ("host", 0)])
def test_an_impossible_choice_is_refused(machine: Any, choice: str, ranks: int | None) -> None:
    machine(0)
    with pytest.raises(ConfigError):
        decoding.make_plan(choice, ranks)


# ---- bench --------------------------------------------------------------------------------------


@pytest.fixture
def benched(monkeypatch: pytest.MonkeyPatch) -> list[LowLatencyOptions]:
    """Stands for the benchmark, which fails; holds what it was asked for."""
    seen: list[LowLatencyOptions] = []

    def main(options: LowLatencyOptions) -> int:
        seen.append(options)
        return 1

    monkeypatch.setattr(low_latency, "main", main)
    return seen


def test_bench_passes_options_on_and_status_back(benched: list[LowLatencyOptions]) -> None:
    line = "bench low-latency --tokens 1,8 --experts 32 --peers none --pairs 3 --no-parts --out -"
    assert run(cli.app, line.split()).exit_code == 1
    (given,) = benched
    assert (given.tokens, given.experts, given.pairs, given.parts) == ((1, 8), (32,), 3, False)
    assert (given.peers, given.out) == (("none",), None)


def test_help_of_a_benchmark_is_its_own() -> None:
    done = command("bench", "low-latency", "--help")
    assert done.returncode == 0
    assert "--dispatch-formats" in done.stdout


def test_a_wrong_benchmark_option_is_status_2(benched: list[LowLatencyOptions]) -> None:
    assert run(cli.app, ["bench", "low-latency", "--nonsense"]).exit_code == 2
    assert not benched


def test_ranks_that_cannot_share_the_models_experts_are_refused_before_any_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = DecodeJob(prompts=(b"in ",), num_tokens=4, stream=True)
    with pytest.raises(ConfigError, match=r"ranks=3: .* 16 experts .* one of 1, 2, 4, 8, 16"):
        decoding.decode(job, Plan("host", 3, "asked for"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["batch", "microbatches", "num_tokens"])
def test_a_job_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=0: it must be at least 1"):
        DecodeJob(prompts=(b"in ",), **{name: 0})
