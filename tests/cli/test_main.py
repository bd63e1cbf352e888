"""The command as a process: exit codes, where text goes, and what starting up costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    *("plan", "train", "resume", "submit", "worker-resources"),
    *("status", "evaluate", "predict", "export", "doctor", "verify", "gc", "bench"),
)


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("import sys; from nf_pipeline.cli import main; sys.exit(main())", *arguments, cwd=cwd)


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def loaded_modules(*arguments: str) -> set[str]:
    code = (
        "import sys; from nf_pipeline.cli import main; code = main(); "
        "sys.stderr.write(' '.join(sys.modules)); sys.exit(code)"
    )
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("submit", "--help"), ("status", "-h")])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    heavy = {"torch", "torchvision", "ray", "pyarrow", "pydantic", "rich", "numpy", "s3fs", "PIL"}
    assert loaded_modules(*arguments) & heavy == set()


def test_help_lists_every_command_in_the_order_of_a_workflow() -> None:
    listed = run("--help").stdout.partition("Commands:")[2]
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    assert names == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_explains_every_option(command: str) -> None:
    from nf_pipeline.cli.app import command_line

    assert run(command, "--help").returncode == 0
    parameters = command_line.commands[command].params
    assert all(parameter.help for parameter in parameters if parameter.param_type_name == "option")


def test_module_can_be_run_with_dash_m() -> None:
    command = [sys.executable, "-m", "nf_pipeline", "gc", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "Usage: nf-pipeline gc" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan",), "--memory-budget 300MiB"),
        (("plan", "--memory-budget", "lots"), "memory.budget_bytes: got 'lots'"),
        (("train", "--memory-budget", "1GiB", "--set", "train.epoch=3"), "train.epochs"),
        (("train", "--memory-budget", "1GiB", "--epochs", "0"), "train.epochs: got 0"),
        (("train", "--memory-budget", "1GiB", "--device", "tpu"), "'tpu' is not one of"),
        (("trian",), "No such command"),
        (("status", "s3://bucket"), "STORE/NAME"),
        (("resume",), "STORE/NAME"),
        (("resume", "r", "--set", "train.epochs=3"), "another --run NAME"),
        (("resume", "r", "--set", "cluster.num_thread=3"), "did you mean cluster.num_threads"),
        (("resume", "r", "--set", "cluster.num_threads=0"), "cluster.num_threads: got 0"),
    ],
)
def test_bad_usage_and_configuration_end_with_2_and_a_text_on_stderr(arguments: tuple[str, ...], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["status", "resume", "verify", "gc"])
def test_absent_run_ends_with_4_and_names_it(command: str, tmp_path: Path) -> None:
    done = run(command, f"{tmp_path}/nothing")
    assert done.returncode == 4
    assert "there is no run 'nothing'" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_of_a_documented_error(tmp_path: Path) -> None:
    for arguments in (("--debug", "status"), ("status", "--debug")):
        done = run(*arguments, f"{tmp_path}/nothing")
        assert done.returncode == 4
        assert "Traceback" in done.stderr


BROKEN = """
import sys
from nf_pipeline.cli.app import command_line, run_command_line

@command_line.command("broken")
def broken():
    {statement}

sys.exit(run_command_line())
"""


@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [
        ("raise ZeroDivisionError('by zero')", 70, "Internal error: ZeroDivisionError: by zero"),
        (
            "from nf_pipeline.errors import InternalError; raise InternalError('odd')",
            70,
            "InternalError: odd",
        ),
        ("from nf_pipeline.errors import PlanError; raise PlanError('conv9', 9, 8, 7)", 3, "layer conv9"),
        (
            "from nf_pipeline.errors import Diverged; raise Diverged('block-001', 'NaN', 'less')",
            5,
            "Fix: less",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("return 7", 7, ""),
    ],
)
def test_every_kind_of_end_has_its_exit_code_and_text(statement: str, code: int, text: str) -> None:
    done = python(BROKEN.format(statement=statement), "broken")
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert ("--debug" in done.stderr) == (code == 70)


def test_bug_with_debug_shows_the_traceback() -> None:
    done = python(BROKEN.format(statement="raise ZeroDivisionError('by zero')"), "--debug", "broken")
    assert done.returncode == 70
    assert "Traceback" in done.stderr


def test_doctor_checks_this_machine_and_a_local_store(tmp_path: Path) -> None:
    done = run("doctor", "--store", "./runs", "--json", cwd=tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stderr
    assert {"python", "torch", "torchvision", "ray", "store: create-once", "store: delete"} <= set(checks)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_doctor_with_an_unusable_store_ends_with_4_and_says_what_to_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = run("doctor", "--store", str(tmp_path / "file" / "runs"))
    assert done.returncode == 4
    assert "fail  store" in done.stdout
    assert "Fix:" in done.stdout
