"""Runs submitted to a real Ray cluster with a token: one head process for all tests of this file."""

import json
import os
import pty
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

START_TIMEOUT_S = 120
SMALL = (
    *("--memory-budget", "4MiB", "--device", "cpu", "--max-train-images", "400"),
    *("--set", "train.unit_layers=2", "--set", "cluster.num_threads=1", "--stop", "never"),
)
FACTORY = """
import os
from torch import nn

def make(num_classes, image_shape):
    network = nn.Sequential()
    network.add_module(os.environ["NF_TEST_LAYER"], nn.Conv2d(image_shape[0], 8, 3))
    network.add_module("flat", nn.Flatten())
    network.add_module("last", nn.LazyLinear(num_classes))
    return network
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray head of its own.

    Attributes:
        address: of its dashboard.
        environment: with which commands may use it.
        folder: for the stores of the tests.
    """

    address: str
    environment: dict[str, str]
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "nf_pipeline", *arguments]

    def submit(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command("submit", *arguments),
            env={**self.environment, **changed},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def python(self, code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", f"import sys\nfrom nf_pipeline.executors.ray_jobs import RayJobs\n{code}"]
        done = subprocess.run(
            [*command, *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self, submission_id: str) -> str:
        return self.python("print(RayJobs(sys.argv[1]).get(sys.argv[2]).status)", self.address, submission_id).strip()

    def stop(self, submission_id: str) -> None:
        self.python("RayJobs(sys.argv[1]).stop(sys.argv[2])", self.address, submission_id)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that advertises what `nf-pipeline worker-resources` prints, word for word."""
    folder, port = tmp_path_factory.mktemp("jobs"), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(folder),  # a token file of this user must not help
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    address = f"http://127.0.0.1:{port}"
    with short_folder() as temp, (folder / "head.log").open("w") as log:
        start = (
            "exec ray start --head --block --disable-usage-stats --port=0 --num-cpus=2 "
            "--object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0 "
            f"--dashboard-agent-listen-port=0 --ray-client-server-port={free_port()} --dashboard-port={port} "
            f"--temp-dir={temp} $(nf-pipeline worker-resources --memory 64MiB)"
        )
        head = subprocess.Popen(["sh", "-c", start], env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_dashboard(head, address, environment["RAY_AUTH_TOKEN"], folder / "head.log")
            yield Cluster(address=address, environment={**environment, "RAY_ADDRESS": address}, folder=folder)
        finally:
            end_group(head)


@contextmanager
def short_folder() -> Iterator[str]:
    """Ray's sockets lie in it, whose paths may have 107 characters; pytest's folders are too long for that."""
    name = tempfile.mkdtemp(prefix="nf-", dir="/tmp")
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)


def wait_for_dashboard(head: subprocess.Popen[bytes], address: str, token: str, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the head did not come up:\n{log.read_text()[-3000:]}")


def end_group(head: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(head.pid, number)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=5)


@pytest.fixture(scope="module")
def first(cluster: Cluster) -> subprocess.CompletedProcess[str]:
    """What submit said about a small run that was trained to its end."""
    return cluster.submit(*SMALL, "--epochs", "1", "--run", "first")


@pytest.fixture
def endless(cluster: Cluster) -> Iterator[str]:
    """The submission id of a job that does not end by itself; it is stopped after the test."""
    done = cluster.submit(*SMALL, "--epochs", "100000", "--run", "endless", "--no-wait", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["run"] == str(cluster.folder / "nf-runs" / "endless")
    assert (document["status"], document["address"]) != ("SUCCEEDED", "")
    yield document["submission_id"]
    cluster.stop(document["submission_id"])


def test_submit_follows_the_log_to_the_end_and_returns_the_exit_code(cluster: Cluster, first) -> None:
    assert first.returncode == 0, first.stderr
    assert "submitted as job nf-first-1" in first.stderr
    assert f"ray job stop --address {cluster.address} nf-first-1" in first.stderr
    assert f"must share {cluster.folder}/nf-runs" in first.stderr
    assert "chosen: exit" in first.stdout
    assert first.stdout.count("model | done") == 1
    summary = json.loads((cluster.folder / "nf-runs" / "first" / "summary.json").read_text())
    assert summary["executor"] == "ray"


def test_submitting_a_finished_run_again_starts_the_next_job_which_skips_everything(cluster: Cluster, first) -> None:
    done = cluster.submit(*SMALL, "--epochs", "1", "--run", "first", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["submission_id"], document["status"], document["exit_code"]) == ("nf-first-2", "SUCCEEDED", 0)
    assert "model | skipped" in done.stderr
    assert "| started" not in done.stderr


def test_broken_connection_goes_on_where_it_ended(cluster: Cluster, first) -> None:
    code = "print(''.join(RayJobs(sys.argv[1]).follow('nf-first-1')), end='')"
    with cutting_proxy(cluster.address, after_bytes=len(first.stdout) // 2) as (address, cuts):
        assert cluster.python(code, address) == first.stdout
    assert len(cuts) == 1


def test_job_gets_shipped_code_and_variables_and_its_exit_code_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "my_network.py").write_text(FACTORY)
    (tmp_path / ".rayignore").write_text("*.json\n")
    shipped = ("--model", "my_network:make", "--working-dir", str(tmp_path), "--env", "NF_TEST_LAYER")
    arguments = (*SMALL, "--run", "own", "--memory-budget", "2KiB", *shipped)
    done = cluster.submit(*arguments, NF_TEST_LAYER="named_by_the_caller")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "layer named_by_the_caller" in done.stdout
    assert "Fix: --memory-budget" in done.stdout


def test_ctrl_c_without_a_terminal_leaves_the_job_running(cluster: Cluster, endless: str) -> None:
    settings = (*SMALL, "--epochs", "100000", "--run", "endless")
    command = cluster.command("submit", *settings)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=cluster.environment, cwd=cluster.folder, text=True, **pipes)
    first_line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert first_line and process.returncode == 130, said
    assert f"job {endless} trains it already" in said
    assert f"job {endless} goes on" in said and f"ray job logs --follow --address {cluster.address} {endless}" in said
    assert "Traceback" not in said
    other = cluster.submit(*settings, "--seed", "7")
    assert other.returncode == 2
    assert f"job {endless}" in other.stderr and "other settings" in other.stderr and "fingerprint" in other.stderr
    assert cluster.status(endless) in ("PENDING", "RUNNING")


@pytest.mark.parametrize(
    ("answer", "said", "status"), [("y", "is STOPPED", ("STOPPED",)), ("n", "goes on", ("PENDING", "RUNNING"))]
)
def test_ctrl_c_on_a_terminal_asks_whether_to_stop_the_job(
    cluster: Cluster, endless: str, answer: str, said: str, status: tuple[str, ...]
) -> None:
    with on_a_terminal(cluster, "submit", *SMALL, "--epochs", "100000", "--run", "endless") as (process, terminal):
        read_until(terminal, "Running entrypoint")
        process.send_signal(signal.SIGINT)
        read_until(terminal, f"stop job {endless} too? [y/N]:")
        os.write(terminal, f"{answer}\n".encode())
        read_until(terminal, f"job {endless} {said}")
        assert process.wait(timeout=60) == 130
    assert cluster.status(endless) in status


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
    ],
)
def test_wrong_or_missing_token_is_an_error_that_names_the_variables(
    cluster: Cluster, changed: dict[str, str], reason: str
) -> None:
    done = cluster.submit(*SMALL, **changed)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr and "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert cluster.environment["RAY_AUTH_TOKEN"] not in done.stderr


def test_head_has_what_worker_resources_printed(cluster: Cluster) -> None:
    show = (
        "import json, ray; ray.init(log_to_driver=False); (node,) = ray.nodes(); "
        "print('NODE', json.dumps([node['Resources'], node['Labels']]))"
    )
    code = (
        "import shlex\n"
        "jobs = RayJobs(sys.argv[1])\n"
        "jobs.submit('show-the-node', shlex.join(['python', '-c', sys.argv[2]]), {}, {})\n"
        "print(''.join(jobs.follow('show-the-node')))"
    )
    log = cluster.python(code, cluster.address, show)
    resources, labels = json.loads(re.search(r"^NODE (.*)$", log, re.MULTILINE).group(1))
    assert resources["cpu_mem_mib"] == 64
    assert "GPU" not in resources
    assert labels["nf-device"] == "cpu"


@contextmanager
def on_a_terminal(cluster: Cluster, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        cluster.command(*arguments),
        env=cluster.environment,
        cwd=cluster.folder,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    try:
        yield process, terminal
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(terminal)


def read_until(terminal: int, text: str, timeout_s: float = 90) -> None:
    seen, deadline = "", time.monotonic() + timeout_s
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in: {seen}"
        try:
            seen += os.read(terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
        except OSError:  # the process has ended
            pytest.fail(f"no {text!r} in: {seen}")


@contextmanager
def cutting_proxy(address: str, *, after_bytes: int) -> Iterator[tuple[str, list[int]]]:
    """Forwards connections; the first one that tails a log is cut after so many bytes."""
    target = ("127.0.0.1", int(address.rpartition(":")[2]))
    cuts: list[int] = []

    def forward(client: socket.socket) -> None:
        with client, closing(socket.create_connection(target)) as server:
            left, is_tail = after_bytes, False
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(512)
                    if not data:
                        return
                    is_tail = is_tail or b"/logs/tail" in data
                    if ready is server and is_tail and not cuts:
                        left -= len(data)
                        if left < 0:
                            cuts.append(1)
                            return
                    (server if ready is client else client).sendall(data)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):  # closed at the end of the test
            while True:
                threading.Thread(target=forward, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cuts
