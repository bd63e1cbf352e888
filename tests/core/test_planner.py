"""Plans of real models: complete, within the budget, and true."""

import itertools
import json
import resource
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.config import RunConfig
from nf_pipeline.core import planner
from nf_pipeline.core.drafts import verified_batch
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.core.partition import budget_for, effective_budget
from nf_pipeline.core.planner import make_plan
from nf_pipeline.core.profiler import StepProbe
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec

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
    return make_plan(cfg, inputs=InputSpec(shape=(3, 32, 32)), target=TargetSpec(size=10), split_rows=ROWS)


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
    model = build_model("vgg11_bn", inputs=InputSpec(shape=(3, 32, 32)), num_outputs=10, seed=0)
    cut_model = cut(model, InputSpec(shape=(3, 32, 32)))
    units = build_units(cut_model, "adaptive", even_spans(8, 1), TargetSpec(size=10), 0)
    ends = [InputSpec(shape=(3, 32, 32)), *map(numbers, cut_model.out_shapes)]
    for block in vgg_plan.blocks:
        probe = StepProbe(
            units[slice(*block.units)], ends[block.layers[0]], train=cfg.train, device=torch.device("cpu")
        )
        assert (
            block.predicted_peak_bytes == probe.peak_bytes(block.batch_size) <= effective_budget(64 * MIB, cfg.memory)
        )


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
    plan = make_plan(
        make_cfg(None, "64MiB", unit_layers=3),
        inputs=InputSpec(shape=(1, 8, 8)),
        target=TargetSpec(size=10),
        split_rows=ROWS,
    )
    assert plan.model == "convnet"


@pytest.mark.parametrize("rows", [60, 2])
def test_no_batch_is_larger_than_the_train_split(rows: int) -> None:
    cfg = make_cfg("convnet", "64MiB")
    plan = make_plan(
        cfg, inputs=InputSpec(shape=(3, 16, 16)), target=TargetSpec(size=10), split_rows={"train": rows, "val": 5}
    )
    assert [block.batch_size for block in plan.blocks] == [rows]
    assert f"batch {rows} is the whole train split" in plan.blocks[0].reason


def test_a_train_split_below_the_smallest_batch_is_a_config_error() -> None:
    cfg = make_cfg("convnet", "64MiB", memory={"budget_bytes": "64MiB", "min_batch_size": 8})
    with pytest.raises(ConfigError, match=r"got 7 samples, want at least memory\.min_batch_size \(8\)"):
        make_plan(cfg, inputs=InputSpec(shape=(3, 16, 16)), target=TargetSpec(size=10), split_rows={"train": 7})


def test_a_budget_beyond_the_devices_memory_counts_as_that_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "total_bytes", lambda _: 8 * MIB)
    plan = plan_32(make_cfg("convnet", "1TiB"))
    assert plan.budget_bytes == 2**40
    assert 7 * MIB < max(block.predicted_peak_bytes for block in plan.blocks) <= 8 * MIB
    monkeypatch.setattr(planner, "total_bytes", lambda _: 2**16)
    with pytest.raises(PlanError) as caught:
        plan_32(make_cfg("convnet", "1TiB"))
    assert caught.value.budget_bytes == 2**16


def test_progress_counts_profiled_units_up_to_all() -> None:
    calls = []
    plan = make_plan(
        make_cfg("convnet", "64MiB", unit_layers=2),
        inputs=InputSpec(shape=(3, 16, 16)),
        target=TargetSpec(size=10),
        split_rows=ROWS,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done + 1, len(plan.units)) for done in range(len(plan.units))]


def test_planning_vgg19_takes_none_of_the_memory_that_it_plans() -> None:
    memory = {"budget_bytes": "1TiB", "max_batch_size": 65536}
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(
        make_cfg("vgg19_bn", "1TiB", unit_layers=3, memory=memory),
        inputs=InputSpec(shape=(3, 32, 32)),
        target=TargetSpec(size=10),
        split_rows={"train": 10**6},
    )
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert len(plan.layers) == 16
    assert max(block.predicted_peak_bytes for block in plan.blocks) > 40 * 2**30
    assert grown_kib < 2**20


@pytest.fixture
def view_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A model whose first layer returns a view: it keeps 64 channels alive where its profile of 4 says little."""
    source = """
        from torch import nn

        class Narrow(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 64, 3, padding=1)

            def forward(self, x_NCHW):
                return self.conv(x_NCHW)[:, :4]

        def make(num_classes):
            tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, num_classes)]
            return nn.Sequential(Narrow(), nn.Conv2d(4, 48, 3, padding=1), nn.ReLU(), *tail)
        """
    (tmp_path / "view_model.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "view_model:make"
    sys.modules.pop("view_model", None)


def test_a_block_that_takes_more_than_its_profiles_add_up_to_is_taken_apart(view_model: str) -> None:
    def plan_with(budget: int) -> Plan:
        memory = {"budget_bytes": budget, "min_batch_size": 64, "join_threshold": 1.0}
        return plan_32(make_cfg(view_model, "1MiB", memory=memory))

    with pytest.raises(PlanError) as caught:
        plan_with(MIB)
    smallest = caught.value.smallest_budget_bytes
    generous = plan_with(10 * smallest)
    assert [block.units for block in generous.blocks] == [(0, 2)]
    resident = sum(unit.resident_bytes for unit in generous.units)
    joint = resident + max(unit.peak_bytes(64) - unit.resident_bytes for unit in generous.units)
    plan = plan_with(budget_for(joint, make_cfg(view_model, "1MiB").memory))
    assert [block.units for block in plan.blocks] == [(0, 1), (1, 2)]
    assert "even at batch 64" in plan.blocks[0].reason
    for budget in range(smallest, 2 * smallest, smallest // 8):
        assert plan_with(budget).units == plan.units
    with pytest.raises(PlanError):
        plan_with(smallest - 1)


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
