"""What nodes have and what fits them, as tables: no cluster."""

import pytest

from nf_pipeline.executors.base import Resources
from nf_pipeline.executors.ray_nodes import classes_of, find_missing, living, names_of, needs_gpu, wanted_of

MIB = 2**20
HEAD = {"CPU": 8.0}
SMALL = {"CPU": 4.0, "GPU": 1.0, "gpu_mem_mib": 3500.0}
LARGE = {"CPU": 4.0, "GPU": 1.0, "gpu_mem_mib": 7600.0}
SILENT = {"CPU": 4.0, "GPU": 1.0}
EDGE = {"CPU": 2.0, "cpu_mem_mib": 64.0}


def resources(memory: int = 0, device: str = "auto", workers: int = 1) -> Resources:
    return Resources(num_cpus=2, device=device, memory_bytes=memory * MIB, num_workers=workers)


def test_dead_nodes_do_not_count() -> None:
    assert living([{"Alive": True, "Resources": HEAD}, {"Alive": False, "Resources": SMALL}]) == [HEAD]


@pytest.mark.parametrize(
    ("device", "nodes", "wanted"),
    [("auto", [HEAD], False), ("auto", [HEAD, SMALL], True), ("cpu", [SMALL], False), ("cuda", [HEAD], True)],
)
def test_auto_takes_a_gpu_where_the_cluster_has_one(device: str, nodes: list, wanted: bool) -> None:
    assert needs_gpu(device, names_of(nodes)) is wanted


@pytest.mark.parametrize(
    ("asked", "nodes", "wanted"),
    [
        (resources(3000), [HEAD, SMALL], {"CPU": 2, "GPU": 1, "gpu_mem_mib": 3000}),
        (resources(3000), [HEAD, SILENT], {"CPU": 2, "GPU": 1}),
        (resources(0), [SMALL], {"CPU": 2, "GPU": 1}),
        (resources(50), [HEAD, EDGE], {"CPU": 2, "GPU": 0, "cpu_mem_mib": 50}),
        (resources(50), [HEAD], {"CPU": 2, "GPU": 0}),
        (resources(50, "cpu"), [EDGE, SMALL], {"CPU": 2, "GPU": 0, "cpu_mem_mib": 50}),
    ],
)
def test_memory_is_asked_for_where_nodes_advertise_it(asked: Resources, nodes: list, wanted: dict) -> None:
    assert wanted_of(asked, names_of(nodes)) == wanted


def test_lost_node_still_decides_what_a_stage_asks_for() -> None:
    known = names_of([HEAD, SMALL])
    assert wanted_of(resources(3000), known) == {"CPU": 2, "GPU": 1, "gpu_mem_mib": 3000}
    assert find_missing(wanted_of(resources(3000), known), 1, [HEAD, SILENT]) is not None


def test_part_of_a_mebibyte_is_rounded_up() -> None:
    asked = Resources(num_cpus=1, device="cpu", memory_bytes=63 * MIB + 1)
    assert wanted_of(asked, names_of([EDGE]))["cpu_mem_mib"] == 64


@pytest.mark.parametrize(
    ("memory", "workers", "nodes", "fits"),
    [
        (3500, 1, [HEAD, SMALL], True),
        (3501, 1, [HEAD, SMALL], False),
        (3501, 1, [HEAD, SMALL, LARGE], True),
        (3501, 2, [HEAD, SMALL, LARGE], False),
        (3500, 2, [HEAD, SMALL, LARGE], True),
        (100, 3, [{**LARGE, "GPU": 2.0}, SMALL], True),
    ],
)
def test_request_fits_if_enough_workers_could_hold_it(memory: int, workers: int, nodes: list, fits: bool) -> None:
    missing = find_missing(wanted_of(resources(memory), names_of(nodes)), workers, nodes)
    assert (missing is None) is fits


def test_what_is_missing_names_the_request_and_every_kind_of_node() -> None:
    nodes = [HEAD, SMALL, SMALL]
    text = find_missing(wanted_of(resources(9000, workers=2), names_of(nodes)), 2, nodes)
    assert text == (
        "asks for 2 workers with 2 CPU, 1 GPU, 9000 gpu_mem_mib on one node; the cluster's nodes have: "
        "8 CPU, 0 GPU, 0 gpu_mem_mib; 2 x (4 CPU, 1 GPU, 3500 gpu_mem_mib)"
    )


def test_classes_are_those_that_advertise_memory_smallest_first() -> None:
    found = classes_of("auto", [LARGE, HEAD, SMALL, SILENT, SMALL])
    assert [(kind.count, kind.memory_bytes // MIB, kind.device) for kind in found] == [
        (2, 3500, "cuda"),
        (1, 7600, "cuda"),
    ]


def test_classes_without_advertised_memory_do_not_say_what_they_have() -> None:
    (kind,) = classes_of("auto", [HEAD, HEAD])
    assert (kind.count, kind.memory_bytes, kind.device, kind.num_cpus) == (2, None, "cpu", 8)
