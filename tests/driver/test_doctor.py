"""What doctor finds on this machine, and in environments that lack something."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nf_pipeline.driver import doctor
from nf_pipeline.driver.doctor import (
    Check,
    check_disk,
    check_gpu,
    check_ray_task,
    check_store,
    exit_code_of,
    run_checks,
)
from nf_pipeline.storage.store import open_store


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_this_environment_can_train(tmp_path: Path) -> None:
    found = states(run_checks(str(tmp_path)))
    assert {found[name] for name in ("python", "torch", "torchvision", "ray")} == {"ok"}
    assert "fail" not in found.values()


def test_every_finding_that_is_not_ok_has_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    checks = run_checks(str(tmp_path / "file" / "store"))
    assert "fail" in states(checks).values()
    assert all(check.fix for check in checks if check.state != "ok")


def test_store_check_tries_everything_and_leaves_nothing(tmp_path: Path) -> None:
    checks = check_store(str(tmp_path))
    assert states(checks) == {
        "store: write": "ok",
        "store: read": "ok",
        "store: create-once": "ok",
        "store: delete": "ok",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["ftp://host/runs", "s3://", ""])
def test_store_check_of_an_impossible_uri_fails_with_a_fix(uri: str) -> None:
    (check,) = check_store(uri)
    assert (check.name, check.state) == ("store", "fail")
    assert check.fix


@pytest.mark.s3
@pytest.mark.parametrize("fixture", ["minio_uri", "moto_uri"])
def test_store_check_passes_on_a_real_s3_server(fixture: str, request: pytest.FixtureRequest) -> None:
    uri = request.getfixturevalue(fixture)
    checks = check_store(uri)
    assert {check.state for check in checks} == {"ok"}, checks
    assert open_store(uri).list("") == []


@pytest.mark.s3
def test_store_check_of_an_absent_bucket_fails_with_a_fix(moto_uri: str) -> None:
    (check,) = check_store(f"{moto_uri.partition('/prefix')[0]}-absent/prefix")
    assert (check.name, check.state) == ("store", "fail")
    assert "does not exist" in check.detail and "bucket" in check.fix


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_store_check_of_a_read_only_folder_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (check,) = check_store(str(tmp_path))
    assert check.state == "fail"


def test_disk_check_looks_at_the_folder_that_exists(tmp_path: Path) -> None:
    (check,) = check_disk(str(tmp_path / "not" / "there"))
    assert check.detail.endswith(str(tmp_path))


def test_disk_check_warns_below_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 2**80)
    assert check_disk(str(tmp_path))[0].state == "warn"
    monkeypatch.setattr(doctor, "NO_DISK_BYTES", 2**80)
    assert check_disk(f"file://{tmp_path}")[0].state == "fail"


def test_disk_check_leaves_object_stores_alone() -> None:
    assert check_disk("s3://bucket/prefix") == check_disk("ftp://host/runs") == []


@pytest.mark.parametrize(
    ("names", "code"), [([], 0), (["torch"], 2), (["store"], 4), (["store", "torch"], 4), (["ray: task"], 2)]
)
def test_exit_code_tells_the_store_from_the_rest(names: list[str], code: int) -> None:
    passed = [
        Check(name="python", state="ok", detail=""),
        Check(name="gpu", state="warn", detail="", fix="x"),
    ]
    assert exit_code_of([*passed, *(Check(name=n, state="fail", detail="", fix="x") for n in names)]) == code


def test_broken_torch_is_a_finding_and_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so not found')")
    code = (
        "from nf_pipeline.driver.doctor import run_checks, exit_code_of\n"
        f"checks = run_checks({str(tmp_path / 'store')!r})\n"
        "print([check.detail for check in checks if check.name == 'torch'], exit_code_of(checks))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(doctor.__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == "['cannot be imported: libcudart.so not found'] 2", done.stderr


@pytest.mark.ray
def test_ray_check_runs_a_task_on_a_local_ray() -> None:
    check = check_ray_task()
    assert check.state == "ok", check.detail


class NotSupported(Exception):
    pass


def fake_driver(**changes: Any) -> SimpleNamespace:
    """What pynvml looks like on a machine with one GPU; real ones are covered by the tests marked gpu."""

    def no_mig(_handle: object) -> object:
        raise NotSupported

    answers = {
        "NVMLError": NotSupported,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlSystemGetDriverVersion": lambda: b"550.54",
        "nvmlDeviceGetHandleByIndex": lambda idx: idx,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda handle: "Tesla K80",
        "nvmlMemory_v2": 2,
        "nvmlDeviceGetMemoryInfo": lambda handle, version=1: SimpleNamespace(free=11 * 2**30, total=12 * 2**30),
        "nvmlDeviceGetMigMode": no_mig,
    }
    return SimpleNamespace(**answers | changes)


def no_driver() -> None:
    raise NotSupported("NVML Shared Library Not Found")


def test_machine_without_a_driver_trains_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlInit=no_driver))
    (check,) = check_gpu()
    assert (check.name, check.state) == ("gpu", "ok")
    assert "NVML Shared Library Not Found" in check.detail


def test_driver_lists_each_gpu_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver())
    checks = check_gpu(has_torch=False)
    assert [check.detail for check in checks] == [
        "NVIDIA 550.54, 1 GPUs",
        "Tesla K80, 11.0 GiB of 12.0 GiB free",
    ]


def test_driver_that_lost_its_gpu_is_a_failure_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_idx: int) -> object:
        raise NotSupported("GPU is lost")

    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlDeviceGetHandleByIndex=lost))
    (check,) = check_gpu(has_torch=False)
    assert (check.name, check.state) == ("driver", "fail")
    assert "GPU is lost" in check.detail


def test_gpu_that_hides_its_memory_is_listed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(_handle: object, _version: int = 1) -> object:
        raise NotSupported

    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlDeviceGetMemoryInfo=hidden))
    assert check_gpu(has_torch=False)[1].detail == "Tesla K80, does not say how much memory it has"


def test_gpu_that_torch_cannot_see_is_a_failure_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = check_gpu()[-1]
    assert (check.name, check.state) == ("cuda", "fail")
    assert "sees none" in check.detail and "CUDA build" in check.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpu()[-1].state == "warn"


@pytest.mark.gpu
def test_real_gpu_is_listed_and_computes() -> None:
    checks = check_gpu()
    assert {check.state for check in checks} == {"ok"}
    assert [check.name for check in checks][:2] == ["driver", "gpu 0"]
    assert checks[-1].name == "cuda"
