"""The planner's choice: backpropagation where memory is loose, local units where it is tight, never a bad batch."""

import json
from collections.abc import Iterator

import pytest

from nf_pipeline.config import ModelConfig, RunConfig
from nf_pipeline.core import timing
from nf_pipeline.core.partition import effective_budget
from nf_pipeline.core.planner import make_plan
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec

MIB = 2**20
SMALL = {
    "inputs": InputSpec(shape=(3, 16, 16)),
    "target": TargetSpec(size=10),
    "split_rows": {"train": 900, "val": 100},
}


def make_cfg(budget: str, train: dict | None = None, **memory: object) -> RunConfig:
    document = {
        "model": {"name": "convnet"},
        "memory": {"budget_bytes": budget, **memory},
        "train": {"device": "cpu", **(train or {})},
    }
    return RunConfig.model_validate(document)


@pytest.fixture(scope="module", autouse=True)
def hasty_timing() -> Iterator[None]:
    """What is measured need not be exact here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "TIMING_S", 0.2)
        yield


@pytest.fixture(scope="module")
def loose() -> Plan:
    return make_plan(make_cfg("1GiB"), **SMALL, is_exhaustive=True)


@pytest.fixture(scope="module")
def tight() -> Plan:
    return make_plan(make_cfg("6MiB"), **SMALL)


def test_loose_budget_leaves_few_units_and_the_largest_batch(loose: Plan) -> None:
    assert [block.batch_size for block in loose.blocks] == [128]
    backpropagation = next(one for one in loose.candidates if one.name == "backpropagation")
    every_layer = next(one for one in loose.candidates if one.name == "a head on every layer")
    assert backpropagation.predicted_s < every_layer.predicted_s
    assert len(loose.units) < len(loose.layers)


def test_backpropagation_with_the_largest_batch_is_taken_without_a_look_at_the_rest(loose: Plan) -> None:
    plan = make_plan(make_cfg("1GiB"), **SMALL)
    assert [candidate.name for candidate in plan.candidates] == ["backpropagation"]
    assert (plan.units, plan.predicted_s > 0) == (loose.units, True)


def test_tight_budget_takes_local_units_whose_batches_train_well(tight: Plan) -> None:
    assert len(tight.units) > 1
    assert min(block.batch_size for block in tight.blocks) > 8
    assert all(
        block.predicted_peak_bytes <= effective_budget(6 * MIB, make_cfg("6MiB").memory) for block in tight.blocks
    )


@pytest.mark.parametrize("name", ["loose", "tight"])
def test_taken_plan_is_a_candidate_and_no_faster_one_trains_well(name: str, request: pytest.FixtureRequest) -> None:
    plan = request.getfixturevalue(name)
    (taken,) = [candidate for candidate in plan.candidates if candidate.verdict.startswith("taken")]
    assert taken.num_units == len(plan.units)
    assert taken.batch_sizes == tuple(block.batch_size for block in plan.blocks)
    assert taken.predicted_s == pytest.approx(plan.predicted_s)
    assert plan.predicted_s == pytest.approx(sum(block.predicted_s for block in plan.blocks))
    for other in plan.candidates:
        assert other.predicted_s >= taken.predicted_s / 1.05 or "is below" in other.verdict
    seconds = [candidate.predicted_s for candidate in plan.candidates]
    assert seconds == sorted(seconds)


def test_plan_with_candidates_survives_json(tight: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(tight.to_json()))) == tight


def test_searched_plan_trains_with_a_third_of_what_backpropagation_needs() -> None:
    def smallest_budget(train: dict) -> int:
        cfg = make_cfg("1MiB", train).model_copy(update={"model": ModelConfig(name="vgg11_bn")})
        with pytest.raises(PlanError) as caught:
            make_plan(
                cfg,
                inputs=InputSpec(shape=(3, 32, 32)),
                target=TargetSpec(size=10),
                split_rows={"train": 900, "val": 100},
            )
        return caught.value.smallest_budget_bytes

    assert smallest_budget({}) < smallest_budget({"unit_layers": 8}) / 3


def test_smallest_budget_of_a_search_makes_a_plan() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(make_cfg("1MiB"), **SMALL)
    smallest = caught.value.smallest_budget_bytes
    plan = make_plan(make_cfg(str(smallest)), **SMALL)
    assert max(block.predicted_peak_bytes for block in plan.blocks) <= smallest
    assert "linear" in {unit.head for unit in plan.units}


def test_forced_layers_have_a_head_each_and_a_predicted_time() -> None:
    plan = make_plan(make_cfg("64MiB", {"local": "layer"}), **SMALL)
    assert len(plan.units) == len(plan.layers)
    assert plan.predicted_s > 0


def test_forced_blocks_have_one_head_each_where_they_fit() -> None:
    plan = make_plan(make_cfg("64MiB", {"local": "block"}), **SMALL, is_exhaustive=True)
    assert not [candidate for candidate in plan.candidates if candidate.name.startswith("a head")]


def test_units_fixed_by_the_user_are_planned_without_timing() -> None:
    plan = make_plan(make_cfg("64MiB", {"unit_layers": 2}), **SMALL)
    assert (plan.candidates, plan.predicted_s, plan.blocks[0].predicted_s) == ((), None, None)


def test_unknown_head_is_refused_even_where_no_head_would_be_built() -> None:
    with pytest.raises(ConfigError, match="unknown head"):
        make_plan(make_cfg("1GiB", {"head": "adaptiv"}), **SMALL)


def test_progress_counts_proposals_up_to_all() -> None:
    calls = []
    make_plan(make_cfg("6MiB"), **SMALL, on_progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))


def test_pipelined_run_is_priced_by_its_slowest_block() -> None:
    plan = make_plan(make_cfg("6MiB", {"mode": "pipelined"}), **SMALL)
    assert len(plan.blocks) > 1
    assert plan.predicted_s == pytest.approx(max(block.predicted_s for block in plan.blocks))
