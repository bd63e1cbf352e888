"""What a worker advertises, for CPU workers and for cards of several kinds."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from nf_pipeline.errors import ConfigError
from nf_pipeline.gpus import Gpu
from nf_pipeline.worker_resources import advertise, label_value

MIB = 2**20
T4 = Gpu(index=0, uuid="GPU-t4", name="Tesla T4", total_bytes=8192 * MIB, free_bytes=8000 * MIB)
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # of Kubernetes; Ray takes the same


def test_card_advertises_its_memory_less_the_reserve() -> None:
    words = advertise([T4], reserve_bytes=512 * MIB).words
    assert words == ["--num-gpus=1", '--resources={"gpu_mem_mib":7680}', "--labels=nf-device=cuda,nf-gpu=Tesla-T4"]


def test_words_survive_an_unquoted_substitution() -> None:
    words = advertise([replace(T4, name="NVIDIA GeForce RTX 3060 Ti (OEM) *?[x]")], reserve_bytes=MIB).words
    assert not any(re.search(r"[\s'*?\[\]\\$`]", word) for word in words)
    assert "nf-gpu=NVIDIA-GeForce-RTX-3060-Ti-OEM-x" in words[-1]


def test_memory_replaces_the_reserve_and_is_rounded_down() -> None:
    assert advertise([T4], 512 * MIB, 1000 * MIB + 5).resources == {"gpu_mem_mib": 1000}
    assert advertise([replace(T4, total_bytes=None, free_bytes=None)], MIB, 64 * MIB).resources == {"gpu_mem_mib": 64}


def test_cpu_worker_advertises_what_it_is_told() -> None:
    worker = advertise([], 512 * MIB, 64 * MIB)
    assert worker.words == ["--num-gpus=0", '--resources={"cpu_mem_mib":64}', "--labels=nf-device=cpu"]
    assert worker.notes == ()


def test_cpu_worker_that_is_told_nothing_advertises_no_memory_and_says_so() -> None:
    worker = advertise([], 512 * MIB)
    assert worker.words == ["--num-gpus=0", "--labels=nf-device=cpu"]
    assert "--memory" in worker.notes[0]


def test_card_that_others_use_gets_a_note_with_both_numbers() -> None:
    (note,) = advertise([replace(T4, free_bytes=100 * MIB)], 512 * MIB).notes
    assert "100.0 MiB" in note and "7.5 GiB" in note
    assert advertise([T4], 512 * MIB).notes == ()


@pytest.mark.parametrize(
    ("gpus", "reserve", "memory", "text"),
    [
        ([], 1, MIB - 1, "--memory"),
        ([T4], 1, 8193 * MIB, r"--memory 8\.0 GiB: GPU 0 \(Tesla T4\) has 8\.0 GiB"),
        ([T4], 8192 * MIB, None, "--reserve"),
        ([replace(T4, total_bytes=None)], 1, None, "does not say"),
    ],
)
def test_size_that_cannot_be_is_an_error(gpus: list[Gpu], reserve: int, memory: int | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        advertise(gpus, reserve, memory)
    assert caught.value.fix


def test_several_cards_are_an_error_with_one_line_for_each() -> None:
    with pytest.raises(ConfigError, match="2 GPUs are visible") as caught:
        advertise([T4, replace(T4, index=1)], MIB)
    assert caught.value.fix.splitlines()[1:] == [
        f"  CUDA_VISIBLE_DEVICES={idx} ray start --address=HEAD:6379 $(nf-pipeline worker-resources --gpu {idx})"
        for idx in (0, 1)
    ]


def test_positions_of_cards_that_differ_come_with_the_order_they_mean() -> None:
    with pytest.raises(ConfigError) as caught:
        advertise([T4, replace(T4, index=1, name="Tesla K80")], MIB)
    assert caught.value.fix.count("CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=") == 2


def test_slices_of_a_card_are_named_by_uuid() -> None:
    slices = [replace(T4, uuid=f"MIG-{letter}", is_slice=True) for letter in "ab"]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=MIG-b ") as caught:
        advertise(slices, MIB)
    assert "--gpu MIG-a" in caught.value.fix


@pytest.mark.parametrize(
    "name", ["Tesla T4", "x" * 80, "-_.", "ﬁ GPU™", "a" * 62 + " b", "NVIDIA A100-SXM4-40GB", ""]
)
def test_label_is_what_ray_accepts(name: str) -> None:
    label = label_value(name)
    assert label == "" or LABEL.fullmatch(label)
    assert ("nf-gpu" in advertise([replace(T4, name=name)], MIB).labels) == bool(label)


def test_json_has_the_words_too() -> None:
    document = json.loads(json.dumps(advertise([T4], 512 * MIB).to_json()))
    assert document["resources"] == {"gpu_mem_mib": 7680}
    assert [shlex.split(shlex.quote(word)) for word in document["words"]] == [[word] for word in document["words"]]
