"""The KubeRay manifests: read by Ray's own autoscaler code, pods checked against Kubernetes' schemas."""

import re
import runpy
import shlex
import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_file import ROOT

from nf_pipeline.gpus import Gpu
from nf_pipeline.units import parse_bytes
from nf_pipeline.worker_resources import advertise

KUBERNETES = "1.31"
CLUSTER = yaml.safe_load((ROOT / "infra" / "kuberay" / "raycluster.yaml").read_text(encoding="utf8"))
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf8")
JOB = yaml.safe_load((ROOT / "infra" / "kuberay" / "rayjob.yaml").read_text(encoding="utf8"))

# Of ray.io/v1 as KubeRay 1.5 documents it: what these manifests may use, so that a misspelt field is found.
CLUSTER_FIELDS = {
    *(
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    ),
    *("suspend", "managedBy", "gcsFaultToleranceOptions", "headServiceAnnotations"),
}
AUTOSCALER_FIELDS = {
    *("version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy"),
    *("securityContext", "env", "envFrom", "volumeMounts"),
}
HEAD_FIELDS = {
    *("rayStartParams", "template", "resources", "labels"),
    *("serviceType", "headService", "enableIngress"),
}
WORKER_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts"),
    *("rayStartParams", "template", "resources", "labels", "suspend", "scaleStrategy"),
}
JOB_FIELDS = {
    *("entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
    *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "clusterSelector", "runtimeEnvYAML", "metadata"),
    *("submitterPodTemplate", "submitterConfig", "entrypointNumCpus", "jobId", "suspend", "managedBy"),
}

HEAD = CLUSTER["spec"]["headGroupSpec"]
(WORKERS,) = CLUSTER["spec"]["workerGroupSpecs"]
GROUPS = {"head": HEAD, "small-gpu": WORKERS}

# What `nf-pipeline worker-resources` would print on such a worker.
CARD = Gpu(index=0, uuid="GPU-0", name="", total_bytes=8 * 2**30, free_bytes=None)
ADVERTISED = advertise([CARD], reserve_bytes=512 * 2**20)


def ray_start_flags() -> set[str]:
    from ray.scripts.scripts import start

    return {flag for parameter in start.params for flag in parameter.opts}


def node_types(cluster: dict[str, Any]) -> dict[str, Any]:
    """Asks Ray's autoscaler for KubeRay what it makes of a manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    named = cluster | {"metadata": cluster["metadata"] | {"namespace": "default"}}
    return _derive_autoscaling_config_from_ray_cr(named)["available_node_types"]


def test_manifests_are_of_the_stable_kind():
    assert (CLUSTER["apiVersion"], CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    for document in (CLUSTER, JOB):
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])


def test_manifests_use_known_fields_only():
    spec = CLUSTER["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert set(HEAD) <= HEAD_FIELDS
    assert set(WORKERS) <= WORKER_FIELDS
    assert set(JOB["spec"]) <= JOB_FIELDS


def test_autoscaler_reads_small_gpu_workers_that_may_all_go():
    group = node_types(CLUSTER)["small-gpu"]
    assert (group["min_workers"], group["max_workers"]) == (0, 8)
    assert group["resources"]["GPU"] == 1
    assert ADVERTISED.resources.items() <= group["resources"].items()
    assert group["labels"] == ADVERTISED.labels


def test_head_takes_no_stages():
    assert node_types(CLUSTER)["headgroup"]["resources"]["CPU"] == 0


def test_advertised_resources_are_those_of_the_pod():
    (container,) = WORKERS["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == WORKERS["resources"]["GPU"]
    assert limits["cpu"] == WORKERS["resources"]["CPU"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == limits["nvidia.com/gpu"]


def test_token_is_demanded():
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", GROUPS)
def test_pod_follows_kubernetes_schema(name):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": GROUPS[name]["template"]["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", GROUPS)
def test_pod_runs_as_an_ordinary_user_and_takes_credentials_from_a_secret(name):
    pod = GROUPS[name]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["envFrom"] == [{"secretRef": {"name": "nf-pipeline-store"}}]
    assert "env" not in container


def test_pods_run_as_the_user_of_the_image():
    dockerfile = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf8")
    (user,) = re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert {group["template"]["spec"]["securityContext"]["runAsUser"] for group in GROUPS.values()} == {int(user)}


def test_image_is_pinned_to_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["version"]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in GROUPS.values()}
    assert {image.partition(":")[2] for image in images} == {version}


@pytest.mark.parametrize("name", GROUPS)
def test_start_parameters_are_flags_of_ray_start(name):
    assert {f"--{parameter}" for parameter in GROUPS[name]["rayStartParams"]} <= ray_start_flags()


def test_job_brings_the_same_cluster():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_job_ends_and_cleans_up():
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0


def test_entrypoint_of_the_job_is_the_job_script_with_settings_that_exist():
    program, script, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert program == "python"
    workdir = re.search(r"^WORKDIR (.+)\nCOPY pyproject", DOCKERFILE, re.MULTILINE).group(1)
    assert "COPY workflows ./workflows" in DOCKERFILE
    module = runpy.run_path(str(ROOT / script.removeprefix(f"{workdir}/")), run_name="job")
    config = module["make_config"](module["parse_arguments"](flags))
    assert (config.cluster.address, config.cluster.executor, config.train.device) == ("auto", "ray", "cuda")
    assert config.cluster.autoscaling  # there may be no worker yet


def test_budget_of_the_job_fits_what_a_worker_advertises():
    flags = shlex.split(JOB["spec"]["entrypoint"])
    budget_bytes = parse_bytes(flags[flags.index("--memory-budget") + 1])
    (memory_mib,) = ADVERTISED.resources.values()
    assert budget_bytes <= memory_mib * 2**20
