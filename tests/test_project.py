"""Holds the project's own files to what they promise: packaging, commands, containers."""

import fnmatch
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf8")
SERVICES = yaml.safe_load(COMPOSE_TEXT)["services"]

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
    assert len(PYPROJECT["dependencies"]) <= 12
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


@pytest.mark.parametrize("target", ["demo", "test", "test-gpu", "lint", "bench", "clean"])
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


def test_compose_has_store_bucket_and_job():
    assert set(SERVICES) == {"object-store", "bucket", "train"}
    assert SERVICES["bucket"]["depends_on"]["object-store"]["condition"] == "service_healthy"
    assert SERVICES["train"]["depends_on"]["bucket"]["condition"] == "service_completed_successfully"


def test_compose_services_that_stay_have_a_health_check():
    lasting = [service for service in SERVICES.values() if service["restart"] != "no"]
    assert lasting
    assert all(service["healthcheck"]["test"] for service in lasting)


def test_compose_publishes_on_loopback_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_compose_has_no_default_credentials():
    sensitive = re.compile(r"KEY|SECRET|PASSWORD|ROOT_USER")
    values = [
        value
        for service in SERVICES.values()
        for name, value in service.get("environment", {}).items()
        if sensitive.search(name)
    ]
    assert len(values) == 6
    assert all(re.fullmatch(r"\$\{NF_S3_(KEY|SECRET):\?[^}]+\}", value) for value in values)


def test_compose_images_are_pinned():
    defaults = re.findall(r"image: \$\{NF_S3_IMAGE:-(\S+?)\}", COMPOSE_TEXT)
    assert set(defaults) == {"quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"}


def test_env_example_names_every_variable_and_gives_no_credential():
    example = (ROOT / ".env.example").read_text(encoding="utf8")
    assert set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT)) == set(re.findall(r"^(?:# )?(NF_\w+)=", example, re.MULTILINE))
    assert re.findall(r"^(NF_\w+)=(.*)$", example, re.MULTILINE) == [("NF_S3_KEY", ""), ("NF_S3_SECRET", "")]


def test_image_runs_as_an_ordinary_user():
    lines = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")
