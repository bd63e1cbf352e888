"""Sources of a draft's blocks: what fits is measured as it trains, what is faster is taken, and the plan says why."""

import copy
from dataclasses import replace

import pytest
import torch

from nf_pipeline.config import RunConfig, StorageConfig, TrainConfig
from nf_pipeline.core.caching import KEPT_BATCH, WORTHWHILE, with_sources
from nf_pipeline.core.drafts import Draft, PlanJob, draft_plan
from nf_pipeline.core.frozen import FrozenUnits, without_head
from nf_pipeline.core.layers import cut
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.models import build_model
from nf_pipeline.core.partition import effective_budget
from nf_pipeline.core.prediction import TimeModel
from nf_pipeline.core.profiler import StepProbe
from nf_pipeline.core.proposals import propose
from nf_pipeline.core.timing import Seconds
from nf_pipeline.core.train_step import forward_block, make_optimizer, train_step
from nf_pipeline.plans import StoreRates
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.units import parse_bytes

CPU = torch.device("cpu")
IMAGE_SHAPE = (3, 16, 16)
ROWS = {"train": 900, "val": 100}

FAST = StoreRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9)
SLOW = StoreRates(read_bytes_per_s=1e5, write_bytes_per_s=1e5)


class EqualLayers:
    """Every layer and head takes 2 ms a sample to train and 0.1 ms forward."""

    def seconds(self, part_idx: int, batch_size: int) -> Seconds:
        return Seconds(step=0.002 * batch_size, forward=0.0001 * batch_size)


def job_for(budget: str, cache: str = "auto", max_batch_size: int = 128, **train: object) -> PlanJob:
    cfg = RunConfig.model_validate(
        {
            "model": {"name": "convnet"},
            "memory": {"budget_bytes": budget, "join_threshold": 0.0, "max_batch_size": max_batch_size},
            "train": {"device": "cpu", "unit_layers": 1, **train},
            "storage": {"cache": cache},
        }
    )
    cut_model = cut(
        build_model("convnet", inputs=InputSpec(shape=IMAGE_SHAPE), num_outputs=10, seed=0),
        InputSpec(shape=IMAGE_SHAPE),
    )
    return PlanJob(
        cfg=cfg,
        memory=cfg.memory,
        budgets=(parse_bytes(budget),),
        cap_name="memory.max_batch_size",
        cut_model=cut_model,
        inputs=InputSpec(shape=IMAGE_SHAPE),
        target=TargetSpec(size=10),
        split_rows=ROWS,
        device=CPU,
    )


def caching(job: PlanJob, cache: str) -> PlanJob:
    """Returns the same job with another policy."""
    return replace(job, cfg=job.cfg.model_copy(update={"storage": StorageConfig(cache=cache)}))


def draft_of(job: PlanJob) -> Draft:
    (proposal,) = propose(job.cfg.train, job.num_layers, job.memory.max_batch_size, lambda span, size: True)
    return draft_plan(job, proposal, job.profile(proposal.spans))


def times_of(job: PlanJob) -> TimeModel:
    return TimeModel(job.cfg, EqualLayers(), job.num_layers, ROWS)


def sources(draft: Draft) -> list[int]:
    return [block.source_block for block in draft.blocks]


def each_before(draft: Draft) -> list[int]:
    return [block.block_idx - 1 for block in draft.blocks]


@pytest.fixture(scope="module")
def tight() -> tuple[PlanJob, Draft]:
    """Blocks of layers that fill 6 MiB."""
    job = job_for("6MiB")
    return job, draft_of(job)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_peak_with_layers_before_it_equals_that_of_real_training(precision: str) -> None:
    job, cfg = job_for("1GiB"), TrainConfig(precision=precision)
    units = job.units([unit.span for unit in draft_of(job).units])
    frozen, trained = units[:2], units[2:4]
    state = copy.deepcopy([unit.state_dict() for unit in units])
    predicted = StepProbe(trained, job.ends[0], train=cfg, device=CPU, frozen=frozen).peak_bytes(24)
    for unit, before in zip(units, state, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in unit.state_dict().items())
        assert all(parameter.requires_grad for parameter in unit.parameters())

    again = FrozenUnits(copy.deepcopy(frozen), cfg.precision)
    own = [copy.deepcopy(unit).train() for unit in trained]
    optimizers = [make_optimizer(unit, cfg, 0.01) for unit in own]
    meter = LiveBytes(CPU)
    meter.track(again, *own)
    with meter:
        for _ in range(2):
            labels_N = torch.zeros(24, dtype=torch.int64)
            train_step(own, optimizers, again.output(torch.randn(24, *IMAGE_SHAPE)), labels_N, cfg.precision)
    assert predicted == pytest.approx(meter.peak_bytes, rel=0.001)
    alone = StepProbe(trained, job.ends[2], train=cfg, device=CPU).peak_bytes(24)
    assert predicted > alone


def test_frozen_units_give_what_the_caching_pass_gives_and_know_no_heads() -> None:
    job = job_for("1GiB")
    units = [unit.eval() for unit in job.units([unit.span for unit in draft_of(job).units])[:2]]
    x_NCHW = torch.randn(4, *IMAGE_SHAPE)
    wanted, _ = forward_block(units, x_NCHW, "fp32", with_heads=False)
    frozen = FrozenUnits(units, "fp32")
    assert torch.equal(frozen.output(x_NCHW), wanted)
    assert not list(without_head(units[0]).head.parameters())
    assert frozen.output(x_NCHW.requires_grad_()).grad_fn is None


def test_slow_store_has_layers_computed_again_and_a_fast_one_does_not(tight: tuple[PlanJob, Draft]) -> None:
    job, draft = tight
    fast, slow = (with_sources(job, draft, times_of(job), rates) for rates in (FAST, SLOW))
    assert sources(fast) == each_before(draft)
    assert any(block.recomputed for block in slow.blocks)
    first = next(block for block in slow.blocks if block.recomputed)
    assert "computed again from" in first.reason and "s an epoch; reading it" in first.reason
    assert "computing it again" in fast.blocks[1].reason


def test_chosen_plan_takes_about_the_least_time_of_all_policies(tight: tuple[PlanJob, Draft]) -> None:
    job, draft = tight
    for rates in (FAST, SLOW, StoreRates(read_bytes_per_s=3e6, write_bytes_per_s=1e6)):
        seconds = {}
        for cache in ("auto", "shards", "recompute"):
            forced = caching(job, cache)
            seconds[cache] = with_sources(forced, draft, times_of(job), rates, is_final=False).predicted_s
        assert (1 - WORTHWHILE) * seconds["auto"] <= min(seconds.values())


def test_only_what_is_read_is_stored_and_every_step_fits(tight: tuple[PlanJob, Draft]) -> None:
    job, draft = tight
    settled = with_sources(caching(job, "recompute"), draft, None, None)
    read = set(sources(settled))
    for before, block in zip(draft.blocks, settled.blocks, strict=True):
        assert (block.shard_bytes > 0) == (block.block_idx in read)
        assert block.predicted_peak_bytes <= effective_budget(block.budget_bytes, job.memory)
        assert KEPT_BATCH * before.batch_size <= block.batch_size <= before.batch_size
        if block.batch_size < before.batch_size:
            assert f"instead of {before.batch_size} to make room" in block.reason


def test_block_with_room_for_all_layers_before_it_starts_from_the_images() -> None:
    job = job_for("64MiB", "recompute", max_batch_size=16)
    job = replace(job, memory=job.memory.model_copy(update={"join_threshold": 0.0}))
    draft = draft_of(job)
    parted = replace(draft, blocks=_one_block_per_unit(job, draft))
    settled = with_sources(job, parted, None, None)
    assert sources(settled) == [-1] * len(parted.blocks)
    assert all(block.reason.endswith("input computed again from the images") for block in settled.blocks[1:])


def test_views_are_priced_in_bytes_and_seconds_and_named_in_the_plan() -> None:
    views = {}
    for num_views in (1, 4):
        job = job_for("6MiB", "shards", augment="flip", views=num_views)
        views[num_views] = with_sources(job, draft_of(job), times_of(job), FAST)
    one, four = (views[num_views].blocks[0] for num_views in (1, 4))
    rows = sum(ROWS.values())
    assert four.shard_bytes * rows == one.shard_bytes * (4 * ROWS["train"] + ROWS["val"])
    assert "stores 4 views of the train split" in four.reason and "views" not in one.reason
    assert four.predicted_s > one.predicted_s
    assert views[4].blocks[-1].predicted_s == views[1].blocks[-1].predicted_s, "it stores nothing and reads as much"


def _one_block_per_unit(job: PlanJob, draft: Draft) -> tuple:
    (whole,) = draft.blocks
    return tuple(
        replace(
            whole,
            block_idx=unit.unit_idx,
            units=(unit.unit_idx, unit.unit_idx + 1),
            layers=(unit.start, unit.stop),
            shard_bytes=job.stored_bytes(unit.stop),
            source_block=unit.unit_idx - 1,
        )
        for unit in draft.units
    )


@pytest.mark.parametrize("rates", [None, SLOW])
def test_without_timings_every_block_is_stored(tight: tuple[PlanJob, Draft], rates: StoreRates | None) -> None:
    job, draft = tight
    assert sources(with_sources(job, draft, None, rates)) == each_before(draft)
    assert sources(with_sources(job, draft, times_of(job), None)) == each_before(draft)
    assert with_sources(job, draft, None, rates).blocks[0].predicted_s is None


def test_pipelined_run_stores_every_block(tight: tuple[PlanJob, Draft]) -> None:
    job, draft = tight
    pipelined = replace(job, cfg=job_for("6MiB", mode="pipelined").cfg)
    assert sources(with_sources(pipelined, draft, times_of(job), SLOW)) == each_before(draft)


def test_pipelined_block_pays_for_every_publication_of_its_activations() -> None:
    seconds = []
    for round_epochs in (4, 2, 1):
        job = job_for("6MiB", mode="pipelined", epochs=4, round_epochs=round_epochs)
        draft = with_sources(job, draft_of(job), times_of(job), SLOW)
        seconds.append([block.predicted_s for block in draft.blocks])
    once, twice, four_times = seconds
    assert len(once) > 1
    for block_idx in range(len(once) - 1):
        published = twice[block_idx] - once[block_idx]
        assert published > 0
        assert four_times[block_idx] - twice[block_idx] == pytest.approx(2 * published)
    assert once[-1] == twice[-1] == four_times[-1]


def test_images_that_are_changed_anew_every_epoch_are_read_back_from_a_block_instead() -> None:
    job = job_for("6MiB", augment="randaugment", epochs=8)
    draft = draft_of(job)
    plain = with_sources(replace(job, change_s=0.0), draft, times_of(job), SLOW)
    dear = with_sources(replace(job, change_s=10.0), draft, times_of(job), SLOW)
    assert sum(source == -1 for source in sources(dear)) < sum(source == -1 for source in sources(plain))
    assert dear.predicted_s > plain.predicted_s
