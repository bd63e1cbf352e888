"""The very commands of docker-compose.yml, as processes: head, two workers and the demo job on a real S3 server."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose_file import ROOT
from compose_processes import ComposeProcesses, Replica, all_running
from s3_servers import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

JOB_TIMEOUT_S = 240
NUM_WORKERS = 2


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="nf-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def bucket(minio_server: S3Server) -> str:
    """A new bucket, made by what stands for the service `bucket`, whose program mc is not to be had here."""
    name = f"compose-{secrets.token_hex(4)}"
    command = [sys.executable, str(ROOT / "infra" / "local" / "make_bucket.py"), name]
    for _ in range(2):  # the service starts again with the stack
        subprocess.run(command, env=os.environ | minio_server.environment, check=True, timeout=60)
    return name


@pytest.fixture
def variables(minio_server: S3Server, bucket: str) -> dict[str, str]:
    """What .env holds: small images, one epoch."""
    return {
        "NF_S3_KEY": minio_server.access_key,
        "NF_S3_SECRET": minio_server.secret_key,
        "NF_S3_ENDPOINT": minio_server.endpoint,
        "NF_S3_BUCKET": bucket,
        "NF_RAY_TOKEN": secrets.token_hex(16),
        "NF_TRAIN_FLAGS": "--epochs 1 --max-train-images 400 --quiet",
    }


def stored(server: S3Server, bucket: str, key: str) -> dict:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    return json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def processes_of(worker: Replica) -> set[int]:
    """Lists the worker processes that a node has had, by the names of their logs."""
    logs = worker.folder.glob("ray/session_*/logs/worker-*.out")
    return {int(re.search(r"-(\d+)\.out$", log.name)[1]) for log in logs}


def test_commands_of_the_services_train_on_their_workers(
    folder: Path, variables: dict[str, str], minio_server: S3Server, bucket: str
) -> None:
    with ComposeProcesses(variables, folder) as compose:
        head = compose.start("ray-head")
        compose.wait_until_healthy(head)
        assert not compose.is_healthy(head, {"RAY_AUTH_TOKEN": "another"})
        workers = [compose.start("worker") for _ in range(NUM_WORKERS)]
        for worker in workers:
            compose.wait_until_healthy(worker)

        with all_running([head, *workers]):
            train = compose.start("train")
            code = train.session.process.wait(JOB_TIMEOUT_S)
        assert code == 0, train.session.text()[-3000:]

        summary = stored(minio_server, bucket, "demo/summary.json")
        assert summary["executor"] == "ray" and summary["memory_budget_bytes"] == 4 * 2**20
        pids = {int(block["worker"].rpartition(":")[2]) for block in summary["blocks"]}
        assert pids and pids <= set().union(*map(processes_of, workers))
