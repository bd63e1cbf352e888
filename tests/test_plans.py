import json

import pytest

from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.samples import InputSpec, TargetSpec


def make_plan() -> Plan:
    layers = tuple(
        LayerSpec(layer_idx=i, name=f"conv{i}", out_shape=(8, 4, 4), params=10, flops=100) for i in range(3)
    )
    units = tuple(
        UnitProfile(
            unit_idx=u,
            start=start,
            stop=stop,
            bytes_per_sample=7,
            constant_bytes=100,
            resident_bytes=50,
            head_params=5,
            head_flops=9,
        )
        for u, (start, stop) in enumerate([(0, 2), (2, 3)])
    )
    block = BlockPlan(
        block_idx=0,
        units=(0, 2),
        layers=(0, 3),
        batch_size=4,
        budget_bytes=2**26,
        predicted_peak_bytes=200,
        shard_bytes=0,
        reason="all units fit",
    )
    return Plan(
        model="convnet",
        target=TargetSpec(size=10),
        inputs=InputSpec(shape=(1, 8, 8)),
        budget_bytes=1000,
        layers=layers,
        units=units,
        blocks=(block,),
        params_full=40,
        flops_full=400,
        profile_s=0.5,
    )


def test_plan_survives_json() -> None:
    plan = make_plan()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plan_of_an_earlier_version_has_one_budget_for_all_blocks() -> None:
    document = json.loads(json.dumps(make_plan().to_json()))
    del document["blocks"][0]["budget_bytes"], document["device"]
    plan = Plan.from_json(document)
    assert (plan.blocks[0].budget_bytes, plan.device) == (1000, "auto")


def test_units_of_a_block_are_those_in_its_range() -> None:
    plan = make_plan()
    assert [unit.unit_idx for unit in plan.units_of(plan.blocks[0])] == [0, 1]


def test_unit_peak_is_linear_in_the_batch() -> None:
    assert make_plan().units[0].peak_bytes(3) == 7 * 3 + 100


def two_block_document(**changes: object) -> dict:
    document = json.loads(json.dumps(make_plan().to_json()))
    first = {**document["blocks"][0], "units": [0, 1], "layers": [0, 2], "shard_bytes": 10}
    second = {**first, "block_idx": 1, "units": [1, 2], "layers": [2, 3], "source_block": 0, **changes}
    return {**document, "blocks": [first, second]}


def test_blocks_of_an_earlier_version_read_the_block_before() -> None:
    document = two_block_document()
    for block in document["blocks"]:
        del block["source_block"]
    plan = Plan.from_json(document)
    assert [block.source_block for block in plan.blocks] == [-1, 0]
    assert [plan.stores(idx) for idx in range(2)] == [True, False]


def test_block_that_starts_from_the_images_computes_the_blocks_between_again() -> None:
    plan = Plan.from_json(two_block_document(source_block=-1))
    assert list(plan.blocks[1].recomputed) == [0] and list(plan.blocks[0].recomputed) == []
    assert not plan.stores(0) and [block.block_idx for block in plan.readers(-1)] == [0, 1]


@pytest.mark.parametrize("changes", [{"source_block": 1}, {"source_block": -2}, {"block_idx": 0}])
def test_block_that_reads_itself_or_a_later_one_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="source_block"):
        Plan.from_json(two_block_document(**changes))
