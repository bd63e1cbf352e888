"""Plans of real models: complete, within the budget, and true."""

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.config import RunConfig
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import build_units
from nf_pipeline.core.models import build_model
from nf_pipeline.core.partition import effective_budget
from nf_pipeline.core.planner import make_plan, verified_batch
from nf_pipeline.core.profiler import predict_block_peak
from nf_pipeline.errors import PlanError
from nf_pipeline.plan import Plan

MIB = 2**20
ROWS = {"train": 900, "val": 100, "test": 50}


def make_cfg(model: str | None, budget: str, unit_layers: int = 1, **sections: object) -> RunConfig:
    document = {
        "model": {"name": model},
        "memory": {"budget_bytes": budget},
        "train": {"unit_layers": unit_layers, "device": "cpu"},
        **sections,
    }
    return RunConfig.model_validate(document)


def plan_32(cfg: RunConfig) -> Plan:
    return make_plan(cfg, image_shape=(3, 32, 32), num_classes=10, split_rows=ROWS)


@pytest.fixture(scope="module")
def vgg_plan() -> Plan:
    return plan_32(make_cfg("vgg11_bn", "64MiB"))


def test_blocks_and_units_cover_all_layers_in_order(vgg_plan: Plan) -> None:
    num_layers = len(vgg_plan.layers)
    for ranges, end in [
        ([(unit.start, unit.stop) for unit in vgg_plan.units], num_layers),
        ([block.units for block in vgg_plan.blocks], len(vgg_plan.units)),
        ([block.layers for block in vgg_plan.blocks], num_layers),
    ]:
        assert ranges[0][0] == 0
        assert ranges[-1][1] == end
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    assert len(vgg_plan.blocks) >= 3


def test_predicted_peaks_are_verified_and_within_the_effective_budget(vgg_plan: Plan) -> None:
    cfg = make_cfg("vgg11_bn", "64MiB")
    model = build_model("vgg11_bn", image_shape=(3, 32, 32), num_classes=10, seed=0)
    cut_model = cut(model, (3, 32, 32))
    units = build_units(cut_model, "adaptive", 1, 10, 0)
    in_shapes = [(3, 32, 32), *cut_model.out_shapes]
    for block in vgg_plan.blocks:
        exact = predict_block_peak(
            units[slice(*block.units)],
            in_shapes[block.layers[0]],
            block.batch_size,
            train=cfg.train,
            device=torch.device("cpu"),
        )
        assert block.predicted_peak_bytes == exact <= effective_budget(64 * MIB, cfg.memory)


def test_early_blocks_are_bound_by_activations_and_late_ones_by_weights(vgg_plan: Plan) -> None:
    first, last = vgg_plan.units[0], vgg_plan.units[-2]
    assert first.bytes_per_sample > 10 * last.bytes_per_sample
    assert last.constant_bytes > 10 * first.constant_bytes


def test_layers_are_described_with_their_weights_and_flops(vgg_plan: Plan) -> None:
    first = vgg_plan.layers[0]
    assert first.out_shape == (64, 16, 16)
    assert first.params == 3 * 64 * 9 + 64 + 2 * 64
    assert first.flops == 2 * 3 * 9 * 64 * 32 * 32
    assert sum(layer.params for layer in vgg_plan.layers) + 512 * 10 + 10 == vgg_plan.params_full
    assert vgg_plan.flops_full == sum(layer.flops for layer in vgg_plan.layers) + 2 * 512 * 10


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_shard_bytes_are_those_of_the_stored_splits_and_none_for_the_last_block(dtype: str, num_bytes: int) -> None:
    plan = plan_32(make_cfg("convnet", "6MiB", storage={"dtype": dtype}))
    assert len(plan.blocks) >= 2
    for block in plan.blocks[:-1]:
        channels, height, width = plan.layers[block.layers[1] - 1].out_shape
        assert block.shard_bytes == (900 + 100) * channels * height * width * num_bytes
    assert plan.blocks[-1].shard_bytes == 0


def test_a_plan_survives_json(vgg_plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(vgg_plan.to_json()))) == vgg_plan


def test_the_same_configuration_makes_the_same_plan() -> None:
    first, second = (plan_32(make_cfg("convnet", "8MiB", unit_layers=3)).to_json() for _ in range(2))
    assert first.pop("profile_s") > 0
    assert second.pop("profile_s") > 0
    assert first == second


@pytest.mark.parametrize(("unit_layers", "precision"), [(1, "fp32"), (3, "bf16")])
def test_the_smallest_budget_of_the_error_makes_a_plan_and_one_byte_less_does_not(
    unit_layers: int, precision: str
) -> None:
    train = {"unit_layers": unit_layers, "precision": precision, "device": "cpu"}
    with pytest.raises(PlanError) as caught:
        plan_32(make_cfg("vgg11_bn", "1MiB", train=train))
    smallest = caught.value.smallest_budget_bytes
    assert caught.value.budget_bytes == MIB < caught.value.needed_bytes <= smallest
    assert "features." in caught.value.layer
    plan = plan_32(make_cfg("vgg11_bn", str(smallest), train=train))
    assert all(block.predicted_peak_bytes <= smallest for block in plan.blocks)
    with pytest.raises(PlanError):
        plan_32(make_cfg("vgg11_bn", str(smallest - 1), train=train))


def test_a_model_that_suits_the_images_is_picked_and_named() -> None:
    plan = make_plan(make_cfg(None, "64MiB", unit_layers=3), image_shape=(1, 8, 8), num_classes=10, split_rows=ROWS)
    assert plan.model == "convnet"


def verify(batch_size: int, available: int, slope: int, peak_at: Callable[[int], int]) -> tuple[int, int]:
    return verified_batch(batch_size, available, slope, make_cfg("convnet", "1MiB").memory, peak_at)


def test_a_batch_is_kept_when_its_line_is_exact() -> None:
    calls = []

    def peak_at(batch_size: int) -> int:
        calls.append(batch_size)
        return 20 * batch_size

    assert verify(50, 1000, 20, peak_at) == (50, 1000)
    assert calls == [50]


def test_a_batch_shrinks_until_its_verified_peak_fits() -> None:
    assert verify(40, 1000, 20, lambda batch_size: 500 + 20 * batch_size) == (25, 1000)


def test_a_batch_grows_into_the_room_that_the_line_left_and_never_beyond_the_cap() -> None:
    assert verify(10, 1000, 20, lambda batch_size: 20 * batch_size) == (50, 1000)
    assert verify(10, 10**6, 20, lambda batch_size: 20 * batch_size) == (128, 2560)


def test_growth_over_a_kink_stops_below_the_budget() -> None:
    def peak_at(batch_size: int) -> int:
        return max(500 + 5 * batch_size, 20 * batch_size)

    batch_size, peak_bytes = verify(20, 1000, 10, peak_at)
    assert peak_bytes == peak_at(batch_size) <= 1000
    assert batch_size >= 45  # 50 is the largest


def test_shrinking_ends_at_the_smallest_batch() -> None:
    assert verify(40, 1000, 20, lambda _: 5000) == (2, 5000)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 900)), min_size=1, max_size=4),
    st.integers(2, 128),
    st.integers(0, 50),
)
def test_the_verified_peak_fits_wherever_the_search_starts(
    lines: list[tuple[int, int]], start: int, slope: int
) -> None:
    def peak_at(batch_size: int) -> int:
        return max(a * batch_size + c for a, c in lines)

    batch_size, peak_bytes = verify(start, 1000, slope, peak_at)
    assert peak_bytes == peak_at(batch_size)
    assert 2 <= batch_size <= 128
    assert peak_bytes <= 1000 or batch_size == 2
