"""Who listens where while a plain `train` runs, and who gets in."""

import os
import subprocess
import sys

import pytest
from planted_run import Planted

from nf_pipeline.config import ClusterConfig
from nf_pipeline.executors import open_executor

pytestmark = [pytest.mark.ray, pytest.mark.s3]

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_everything_that_train_starts_listens_on_loopback_only(planted: Planted) -> None:
    programs = {program for program, _ in planted.listening}
    assert {"gcs_server", "raylet"} <= programs, "the local Ray was not seen"
    assert {(program, address) for program, address in planted.listening if address not in LOOPBACK} == set()


def test_local_ray_demands_a_token_of_its_own_that_is_left_nowhere(planted: Planted) -> None:
    assert len(planted.token_of_ray) == 64
    left = [path for path in planted.ray_folder.parent.rglob("*") if path.is_file()]
    assert len(left) > 10
    assert [path for path in left if planted.token_of_ray.encode() in path.read_bytes()] == []
    assert not (planted.ray_folder.parent / ".ray").exists(), "Ray's own token file, readable by everybody"
    assert not any(planted.token_of_ray in text for text in planted.outputs.values())


def test_only_who_has_the_token_gets_into_a_local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    import ray

    with open_executor(ClusterConfig()):
        address = ray.get_runtime_context().gcs_address
        assert address.startswith("127.0.0.1:")
        environment = dict(os.environ)
        ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        stranger = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        asking = [
            subprocess.Popen(ask, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for env in (environment, stranger, environment | {"RAY_AUTH_TOKEN": "0" * 64})
        ]
        owner, *strangers = [process.wait(60) for process in asking]
        assert owner == 0 and 0 not in strangers
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ), "the environment is as it was"
