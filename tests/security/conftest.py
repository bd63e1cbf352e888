"""One run with planted secrets for all tests of this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_run import PLANTED, SMALL, Planted, environment_for, watched_training
from s3_servers import S3Server


@pytest.fixture(scope="session")
def planted(minio_server: S3Server) -> Iterator[Planted]:
    """A finished run on S3 by a local Ray, with --debug, in an environment full of secrets."""
    folder = Path(tempfile.mkdtemp(prefix="nf-planted-", dir="/tmp"))  # short: its path is part of sockets' names
    environment = environment_for(minio_server, folder)
    keys = (minio_server.access_key, minio_server.secret_key)
    store_uri = f"s3://{minio_server.make_bucket()}/runs"
    run = Planted(environment=environment, secrets=(*keys, *PLANTED), store_uri=store_uri, ray_folder=folder / "ray")
    before = {name: os.environ.get(name) for name in minio_server.environment}
    os.environ.update(minio_server.environment)
    try:
        flags = ("--store", store_uri, "--run", "first", "--debug", *SMALL)
        assert watched_training(run, folder / "train.log", flags) == 0, run.outputs["train"]
        yield run
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)
