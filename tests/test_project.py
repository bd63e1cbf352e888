"""Holds the project's own files to what they promise: packaging and commands. tests/infra does so for containers."""

import fnmatch
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]

ALLOWED_TOP_LEVEL = {
    *("nf_pipeline", "workflows", "tests", "infra", ".ci", ".git"),
    *(
        "pyproject.toml",
        "docker-compose.yml",
        "Makefile",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
    ),
    *(".gitignore", ".rayignore", ".dockerignore", ".env.example"),
}


def requirement(name: str) -> Requirement:
    found = [Requirement(line) for line in PYPROJECT["dependencies"] if Requirement(line).name == name]
    assert len(found) == 1, f"{name} stands {len(found)} times in the dependencies"
    return found[0]


@pytest.mark.parametrize("name", ["torch", "torchvision", "ray", "pyarrow", "s3fs", "nvidia-ml-py", "safetensors"])
def test_dependency_is_a_range_without_an_upper_bound(name):
    specifiers = list(requirement(name).specifier)
    assert [specifier.operator for specifier in specifiers] == [">="]


def test_dependencies_are_what_the_job_needs():
    assert requirement("ray").extras == {"default"}
    assert requirement("torch").specifier.contains("2.14.1")
    assert len(PYPROJECT["dependencies"]) <= 14
    assert PYPROJECT["requires-python"] == ">=3.11"
    assert PYPROJECT["scripts"] == {"nf-pipeline": "nf_pipeline.cli:main"}


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf8")
    assert PYPROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_top_level_has_only_the_agreed_entries():
    ignored = [
        line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    entries = {
        entry.name for entry in ROOT.iterdir() if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    }
    assert entries - ALLOWED_TOP_LEVEL == set()


def test_readme_starts_with_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    commands = [line.split("#")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    made = [command for command in commands if command.startswith("make ")]
    assert made[:2] == ["make demo", "make test"]
    assert commands[0] == "make demo"


@pytest.mark.parametrize(
    "target", ["demo", "test", "test-gpu", "test-faults", "soak", "lint", "bench", "bench-gpu", "clean"]
)
def test_make_knows_target(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_make_demo_trains_under_a_budget_and_predicts():
    commands = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert re.search(r"nf-pipeline train .*--memory-budget \d+MiB", commands)
    assert "nf-pipeline predict" in commands


def test_ci_run_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], timeout=60).returncode == 0
    text = script.read_text(encoding="utf8")
    assert "set -euo pipefail" in text
    assert re.search(r"^(exec )?make test\b", text, re.MULTILINE)
