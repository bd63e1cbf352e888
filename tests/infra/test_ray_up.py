"""infra/ray-up.yaml: what `ray up` itself accepts, with commands that exist."""

import re
import subprocess

import jsonschema
import pytest
import yaml
from compose_file import ROOT

CONFIG = yaml.safe_load((ROOT / "infra" / "ray-up.yaml").read_text(encoding="utf8"))
COMMANDS = [
    *CONFIG["setup_commands"],
    *CONFIG["head_start_ray_commands"],
    *CONFIG["worker_start_ray_commands"],
]


def check(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_ray_accepts_the_cluster():
    check(CONFIG)


def test_ray_refuses_a_misspelt_setting():
    with pytest.raises(jsonschema.ValidationError):
        check(CONFIG | {"worker_start_ray_comands": []})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_good_bash(command):
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_ray_start_is_given_flags_that_exist():
    from ray.scripts.scripts import start

    known = {flag for parameter in start.params for flag in parameter.opts}
    used = [
        flag for command in COMMANDS if "ray start" in command for flag in re.findall(r"(?<=\s)--[a-z-]+", command)
    ]
    elsewhere = {"--query-gpu", "--format", "--gpu"}  # of nvidia-smi and worker-resources
    assert set(used) - elsewhere <= known
    assert {"--head", "--address", "--temp-dir"} <= set(used)


def test_every_node_demands_the_token():
    starts = [command for command in COMMANDS if "ray start" in command]
    assert len(starts) == 2
    assert all("export RAY_AUTH_MODE=token" in command for command in starts)
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_worker_command_starts_one_node_per_gpu(tmp_path):
    """The command itself, with programs in its way that say what they were called with."""
    log = tmp_path / "calls"
    tools = {
        "nvidia-smi": "printf '0\\n1\\n'",
        "nf-pipeline": f'echo "--resources=$3" ; echo "$@" >> {log}',
        "ray": f'echo "$CUDA_VISIBLE_DEVICES $@" >> {log}',
        "nproc": "echo 8",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    home = tmp_path / "home"
    (home / ".nf-pipeline").mkdir(parents=True)
    (home / ".nf-pipeline" / "store.env").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(home), "RAY_HEAD_IP": "192.0.2.10"}
    command = CONFIG["worker_start_ray_commands"][-1]
    subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)
    calls = log.read_text().splitlines()
    assert calls[::2] == ["worker-resources --gpu 0", "worker-resources --gpu 1"]
    for gpu, call in enumerate(calls[1::2]):
        assert call.startswith(f"{gpu} start --address=192.0.2.10:6379 --num-cpus=4 --resources={gpu} ")
        assert f"--temp-dir=/tmp/ray-gpu-{gpu} " in call
    assert "--dashboard-agent-listen-port=52366" in calls[3]
