"""docker-compose.yml: valid, closed to the network, without default credentials, every image pinned."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml
from compose_file import COMPOSE_TEXT, ROOT, VariableMissing, interpolate, read_services

CREDENTIALS = {"NF_S3_KEY": "k" * 8, "NF_S3_SECRET": "s" * 16, "NF_RAY_TOKEN": "t" * 16}
SERVICES = read_services(CREDENTIALS)
RAY_SERVICES = ("ray-head", "worker", "gpu-worker", "train")
SENSITIVE = re.compile(r"KEY|SECRET|PASSWORD|ROOT_USER|TOKEN")
STORE_DOCKERFILE = (ROOT / "infra" / "object-store.Dockerfile").read_text(encoding="utf8")
ENV_EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf8")


def environments_as_written() -> list[tuple[str, str]]:
    """Lists every service's environment before variables are filled in."""
    services = yaml.safe_load(COMPOSE_TEXT)["services"].values()
    return [item for service in services for item in service.get("environment", {}).items()]


def follows_schema(text: str, tmp_path: Any) -> bool:
    file = tmp_path / "docker-compose.yml"
    file.write_text(text, encoding="utf8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_compose_file_follows_the_specification(tmp_path):
    assert follows_schema(interpolate(COMPOSE_TEXT, CREDENTIALS), tmp_path)


def test_misspelt_service_key_does_not_follow_the_specification(tmp_path):
    text = interpolate(COMPOSE_TEXT, CREDENTIALS)
    assert not follows_schema(text.replace("healthcheck:", "healthchek:"), tmp_path)


def test_compose_has_the_whole_stack():
    assert set(SERVICES) == {"object-store", "bucket", "ray-head", "worker", "gpu-worker", "train"}
    assert SERVICES["gpu-worker"]["profiles"] == ["gpu"]
    assert all("profiles" not in service for name, service in SERVICES.items() if name != "gpu-worker")


def test_services_wait_for_what_they_need():
    assert SERVICES["bucket"]["depends_on"]["object-store"]["condition"] == "service_healthy"
    assert SERVICES["worker"]["depends_on"]["ray-head"]["condition"] == "service_healthy"
    conditions = {name: needed["condition"] for name, needed in SERVICES["train"]["depends_on"].items()}
    assert conditions == {
        "bucket": "service_completed_successfully",
        "ray-head": "service_healthy",
        "worker": "service_healthy",
    }


def test_services_that_stay_have_a_health_check():
    lasting = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}
    assert set(lasting) == {"object-store", "ray-head", "worker", "gpu-worker"}
    assert all(service["healthcheck"]["test"] for service in lasting.values())


def test_workers_scale():
    assert "container_name" not in SERVICES["worker"] and "ports" not in SERVICES["worker"]
    assert int(SERVICES["worker"]["deploy"]["replicas"]) == 2
    assert int(read_services(CREDENTIALS | {"NF_WORKERS": "5"})["worker"]["deploy"]["replicas"]) == 5


def test_gpu_worker_reserves_one_gpu_and_the_others_none():
    (device,) = SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    others = [service.get("deploy", {}) for name, service in SERVICES.items() if name != "gpu-worker"]
    assert all("reservations" not in deploy.get("resources", {}) for deploy in others)


def test_ports_are_published_on_loopback_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:9000:9000", "127.0.0.1:9001:9001", "127.0.0.1:8265:8265"]
    assert all("network_mode" not in service for service in SERVICES.values())


def test_every_credential_comes_from_a_required_variable():
    values = [value for name, value in environments_as_written() if SENSITIVE.search(name)]
    assert len(values) == 2 + 2 + 4 * 3  # store, bucket, four Ray services
    required = re.compile(r"\$\{(NF_S3_KEY|NF_S3_SECRET|NF_RAY_TOKEN):\?[^}]+\}")
    assert [value for value in values if not required.fullmatch(value)] == []


@pytest.mark.parametrize("name", CREDENTIALS)
@pytest.mark.parametrize("value", [None, ""])
def test_missing_credential_stops_compose(name, value):
    variables = {key: text for key, text in CREDENTIALS.items() if key != name}
    if value is not None:
        variables[name] = value
    with pytest.raises(VariableMissing, match=name):
        read_services(variables)


@pytest.mark.parametrize("name", RAY_SERVICES)
def test_ray_service_demands_the_token(name):
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"] == CREDENTIALS["NF_RAY_TOKEN"]


@pytest.mark.parametrize("name", RAY_SERVICES)
def test_ray_service_has_time_to_drain_and_few_rights(name):
    service = SERVICES[name]
    drain_s = float(service["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drain_s < float(service["stop_grace_period"].removesuffix("s"))
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert service["deploy"]["resources"]["limits"]["memory"]


def test_images_are_pinned():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["version"]
    store_image = "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"
    images = {name: service["image"] for name, service in SERVICES.items()}
    own = {"object-store": f"nf-pipeline-object-store:{version}", "bucket": store_image}
    assert images == own | dict.fromkeys(RAY_SERVICES, f"nf-pipeline:{version}")
    assert SERVICES["object-store"]["build"]["args"] == {"IMAGE": store_image}
    assert f"ARG IMAGE={store_image}\n" in STORE_DOCKERFILE
    given = read_services(CREDENTIALS | {"NF_S3_IMAGE": "a:1", "NF_IMAGE": "b:2"})
    assert {service["image"] for service in given.values()} == {own["object-store"], "a:1", "b:2"}
    assert given["object-store"]["build"]["args"] == {"IMAGE": "a:1"}


@pytest.mark.parametrize("name", SERVICES)
def test_service_runs_as_an_ordinary_user_that_can_gain_nothing(name):
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("file", ["Dockerfile", "object-store.Dockerfile"])
def test_image_ends_as_the_user_of_the_services_and_holds_no_credential(file):
    lines = (ROOT / "infra" / file).read_text(encoding="utf8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1].partition(":")[0] == SERVICES["worker"]["user"].partition(":")[0]
    assert [line for line in lines if re.match("ENV|ARG", line) and SENSITIVE.search(line)] == []


@pytest.mark.parametrize("name", ["object-store", "bucket"])
def test_service_of_the_store_writes_only_to_its_volume_and_to_memory(name):
    service = SERVICES[name]
    assert service["read_only"] is True and service["tmpfs"] == [service["environment"]["HOME"]]


def test_data_is_in_a_named_volume():
    volumes = yaml.safe_load(COMPOSE_TEXT)["volumes"]
    used = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert used == list(volumes) == ["object-store"]


@pytest.mark.parametrize("name", ["worker", "gpu-worker", "train"])
def test_script_of_a_service_is_good_bash(name):
    service = SERVICES[name]
    assert service["entrypoint"] == ["/bin/bash", "-eufc"]
    (script,) = service["command"]
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_train_passes_settings_that_exist():
    from click.testing import CliRunner

    from nf_pipeline.cli.app import command_line

    (script,) = SERVICES["train"]["command"]
    last = script.replace("\\\n", " ").splitlines()[-1].removeprefix("exec nf-pipeline ")
    words = shlex.split(last.replace('"$NF_MEMORY_BUDGET"', "4MiB").replace('"$NF_WORKER_CPUS"', "1"))
    # plan takes the flags of train; an impossible model ends it before it does any work, here and without a cluster
    arguments = ["plan", *words[1:-1], "--executor", "inline", "--model", "no_such_model"]
    answer = CliRunner().invoke(command_line, arguments)
    assert "no_such_model" in str(answer.exception), (answer.output, answer.exception)


def test_env_example_names_every_variable_and_gives_no_credential():
    names = set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT))
    assert names == set(re.findall(r"^(?:# )?(NF_\w+)=", ENV_EXAMPLE, re.MULTILINE))
    assert re.findall(r"^(NF_\w+)=(.*)$", ENV_EXAMPLE, re.MULTILINE) == [(name, "") for name in CREDENTIALS]


def test_env_example_says_the_defaults():
    stated = dict(re.findall(r"^# (NF_\w+)=(.*)$", ENV_EXAMPLE, re.MULTILINE))
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE_TEXT))
    assert stated == defaults


def test_command_in_env_example_makes_every_credential(tmp_path):
    (command,) = re.findall(r"^#\s+(for name in .*)$", ENV_EXAMPLE, re.MULTILINE)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=60)
    variables = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert read_services(variables)
    assert len(set(variables.values())) == 3 and json.dumps(variables)
