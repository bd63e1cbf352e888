"""submit and worker-resources as processes, without a cluster; with one: tests/executors/test_ray_jobs.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ONE_CARD = """
from types import SimpleNamespace

class NVMLError(Exception):
    pass

nvmlMemory_v2 = 2
nvmlInit = nvmlShutdown = lambda: None
nvmlSystemGetDriverVersion = lambda: "550.54"
nvmlDeviceGetCount = lambda: {count}
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda handle: f"GPU-{{handle}}"
nvmlDeviceGetName = lambda handle: "Tesla T4"
nvmlDeviceGetMigMode = lambda handle: (0, 0)
nvmlDeviceGetMemoryInfo = lambda handle, version=1: SimpleNamespace(total=8 << 30, free=8 << 30, reserved=0)
"""


def run(*arguments: str, pynvml: Path | None = None, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | changed
    if pynvml is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(pynvml), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "nf_pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def cards(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a stand-in for pynvml that has so many cards."""
    (tmp_path / "pynvml.py").write_text(ONE_CARD.format(count=request.param))
    return tmp_path


def test_cpu_worker_is_one_line_of_words() -> None:
    done = run("worker-resources", "--memory", "64MiB", CUDA_VISIBLE_DEVICES="")
    assert done.stdout == '--num-gpus=0 --resources={"cpu_mem_mib":64} --labels=nf-device=cpu\n'
    assert (done.returncode, done.stderr) == (0, "")


def test_cpu_worker_without_a_size_says_what_that_means() -> None:
    done = run("worker-resources", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (0, "--num-gpus=0 --labels=nf-device=cpu\n")
    assert "placed by CPUs alone" in done.stderr


@pytest.mark.parametrize("cards", [1], indirect=True)
def test_card_is_one_line_of_words(cards: Path) -> None:
    words = '--num-gpus=1 --resources={"gpu_mem_mib":7680} --labels=nf-device=cuda,nf-gpu=Tesla-T4\n'
    assert run("worker-resources", pynvml=cards).stdout == words
    document = json.loads(run("worker-resources", "--json", "--memory", "6GiB", pynvml=cards).stdout)
    assert document["resources"] == {"gpu_mem_mib": 6144}


@pytest.mark.parametrize("cards", [2], indirect=True)
def test_machine_with_several_cards_needs_one_call_for_each(cards: Path) -> None:
    done = run("worker-resources", pynvml=cards)
    assert (done.returncode, done.stdout) == (2, "")
    assert "CUDA_VISIBLE_DEVICES=1 ray start" in done.stderr
    for chosen in (
        run("worker-resources", "--gpu", "1", pynvml=cards),
        run("worker-resources", "--gpu", "GPU-1", pynvml=cards),
    ):
        assert (chosen.returncode, chosen.stdout.count("gpu_mem_mib")) == (0, 1)
    assert run("worker-resources", pynvml=cards, CUDA_VISIBLE_DEVICES="1").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--memory", "lots"), "--memory: got 'lots'"),
        (("--memory", "64"), "want at least 1MiB"),
        (("--reserve", "0"), "--reserve"),
        (("--gpu", "0"), "--gpu 0 names no GPU"),
    ],
)
def test_bad_values_of_worker_resources_end_with_2(arguments: tuple[str, ...], text: str) -> None:
    done = run("worker-resources", *arguments, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr and "Fix:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--memory-budget 300MiB"),
        (("--memory-budget", "4MiB", "--address", "http://127.0.0.1:1"), "no Ray dashboard answers"),
        (("--memory-budget", "4MiB", "--address", "head:6379"), "http://HEAD:8265"),
        (("--memory-budget", "4MiB", "--executor", "inline"), "--executor ray"),
        (("--memory-budget", "4MiB", "--env", "NF_TEST_ABSENT"), "--env NF_TEST_ABSENT"),
    ],
)
def test_submission_that_cannot_be_ends_with_2_in_seconds(arguments: tuple[str, ...], text: str) -> None:
    done = run("submit", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_address_of_submit_is_explained_as_the_dashboard() -> None:
    assert "Dashboard of the cluster" in run("submit", "--help").stdout
    assert "Dashboard of the cluster" not in run("train", "--help").stdout
