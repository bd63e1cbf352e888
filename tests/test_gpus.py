"""What is made of a driver's answers; a stand-in for the driver, since most machines that run this have none."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nf_pipeline.errors import ConfigError
from nf_pipeline.gpus import Gpu, find_gpus, read_driver, visible_gpus

GIB = 2**30


class NVMLError(Exception):
    pass


def fake_driver(**changes: Any) -> SimpleNamespace:
    """What pynvml looks like with a Tesla T4 and an A100 that is cut into two slices."""

    def mig_mode(handle: str) -> list[int]:
        if handle == "t4":
            raise NVMLError("Not Supported")
        return [1, 1]

    def slice_handle(_handle: str, slice_idx: int) -> str:
        if slice_idx > 1:
            raise NVMLError("Not Found")
        return f"slice{slice_idx}"

    def memory(handle: str, version: int | None = None) -> SimpleNamespace:
        total = {"t4": 16 * GIB}.get(handle, 5 * GIB)
        kept = {"reserved": GIB // 2} if version else {}
        return SimpleNamespace(total=total, free=total - GIB, **kept)

    answers = {
        "NVMLError": NVMLError,
        "nvmlMemory_v2": 2,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"550.54",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: ["t4", "a100"][index],
        "nvmlDeviceGetMigMode": mig_mode,
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": slice_handle,
        "nvmlDeviceGetUUID": lambda handle: f"{'MIG' if 'slice' in handle else 'GPU'}-{handle}",
        "nvmlDeviceGetName": lambda handle: b"Tesla T4" if handle == "t4" else "NVIDIA A100 MIG 1g.5gb",
        "nvmlDeviceGetMemoryInfo": memory,
    }
    return SimpleNamespace(**answers | changes)


def fails(text: str) -> Any:
    def fail(*_arguments: object) -> Any:
        raise NVMLError(text)

    return fail


def gpu(index: int, uuid: str) -> Gpu:
    return Gpu(index=index, uuid=uuid, name="Tesla T4", total_bytes=GIB, free_bytes=GIB)


CARDS = [gpu(0, "GPU-aaaa"), gpu(1, "GPU-aabb"), gpu(2, "MIG-1111"), gpu(2, "MIG-2222")]


def test_cards_and_slices_are_listed_with_what_programs_can_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver())
    driver = read_driver()
    assert (driver.version, driver.problem) == ("550.54", "")
    assert [(gpu.index, gpu.uuid, gpu.name, gpu.is_slice) for gpu in driver.gpus] == [
        (0, "GPU-t4", "Tesla T4", False),
        (1, "MIG-slice0", "NVIDIA A100 MIG 1g.5gb", True),
        (1, "MIG-slice1", "NVIDIA A100 MIG 1g.5gb", True),
    ]
    assert [(gpu.total_bytes, gpu.free_bytes) for gpu in driver.gpus[:2]] == [
        (15.5 * GIB, 15 * GIB),
        (4.5 * GIB, 4 * GIB),
    ]


def test_older_driver_answers_without_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(_handle: str, version: int | None = None) -> SimpleNamespace:
        if version:
            raise NVMLError("Function Not Found")
        return SimpleNamespace(total=2 * GIB, free=GIB)

    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlDeviceGetMemoryInfo=memory))
    assert {gpu.total_bytes for gpu in read_driver().gpus} == {2 * GIB}


def test_card_that_hides_its_memory_has_none_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlDeviceGetMemoryInfo=fails("No Permission")))
    assert {(gpu.total_bytes, gpu.free_bytes) for gpu in read_driver().gpus} == {(None, None)}


def test_machine_without_a_driver_has_no_cards_and_nothing_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(nvmlInit=fails("Shared Library Not Found")))
    driver = read_driver()
    assert (driver.gpus, driver.fix) == ((), "")
    assert "Shared Library Not Found" in driver.problem


def test_machine_without_pynvml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_driver().fix == "pip install nvidia-ml-py"


def test_driver_that_fails_is_an_error_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    driver = fake_driver(nvmlDeviceGetUUID=fails("GPU is lost"), nvmlShutdown=lambda: closed.append(1))
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with pytest.raises(ConfigError, match="GPU is lost"):
        read_driver()
    assert closed == [1]


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        (None, ["GPU-aaaa", "GPU-aabb", "MIG-1111", "MIG-2222"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["GPU-aabb"]),
        ("1, 0", ["GPU-aabb", "GPU-aaaa"]),
        ("0,-1,1", ["GPU-aaaa"]),
        ("GPU-aab", ["GPU-aabb"]),
        ("MIG-2222,0", ["MIG-2222", "GPU-aaaa"]),
        ("2", ["MIG-1111", "MIG-2222"]),
    ],
)
def test_visible_devices_choose_by_position_or_uuid(wanted: str | None, uuids: list[str]) -> None:
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert [gpu.uuid for gpu in visible_gpus(CARDS, environment)] == uuids


@pytest.mark.parametrize("wanted", ["3", "GPU-cc", "GPU-aa", "0,", "first", "0,0", "GPU-aaaa,0", "²"])
def test_visible_devices_that_name_no_card_or_one_twice_are_an_error(wanted: str) -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES="):
        visible_gpus(CARDS, {"CUDA_VISIBLE_DEVICES": wanted})


def test_visible_devices_do_not_matter_without_cards() -> None:
    assert visible_gpus([], {"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_unknown_card_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"--gpu 9 names no GPU; there are: 0 \(GPU-aaaa, Tesla T4\)"):
        find_gpus(CARDS, "9", "--gpu 9")


@pytest.mark.gpu
def test_real_driver_tells_the_memory_that_torch_sees() -> None:
    import torch

    (first, *_) = visible_gpus(read_driver().gpus)
    assert first.total_bytes == pytest.approx(torch.cuda.get_device_properties(0).total_memory, rel=0.02)
