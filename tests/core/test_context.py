"""What units add to their inputs: forms, first steps, bytes of real training, and the model that is loaded again."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from sample_kinds import KINDS
from torch import nn

from nf_pipeline.config import RunConfig, TrainConfig
from nf_pipeline.core import stand_ins
from nf_pipeline.core.caching import with_sources
from nf_pipeline.core.context import LARGEST_KERNEL, build_context, check_context, check_sample_stays, needs_samples
from nf_pipeline.core.drafts import PlanJob, draft_plan, verify_draft
from nf_pipeline.core.early_exit_model import all_logits
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.mixup import Mix, draw_mix
from nf_pipeline.core.models import build_model
from nf_pipeline.core.planner import make_plan
from nf_pipeline.core.profiler import StepProbe, count_params
from nf_pipeline.core.proposals import propose
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.core.train_step import forward_block, make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.plans import UnitSpan
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.worker.decide import exit_costs

CPU = torch.device("cpu")
IMAGES = InputSpec(shape=(3, 16, 16), mean=(127.5,) * 3, std=(63.75,) * 3)
CLASSES = TargetSpec(size=10)
SAMPLE = TrainConfig(context="sample")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small only lose by waiting for other threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cut_convnet() -> CutModel:
    return cut(build_model("convnet", inputs=IMAGES, num_outputs=10, seed=0), IMAGES)


def make_units(train: TrainConfig = SAMPLE, unit_layers: int = 2, segment_layers: int = 0) -> list[LocalUnit]:
    spans = even_spans(6, unit_layers, segment_layers)
    return build_units(cut_convnet(), "adaptive", spans, CLASSES, 0, train=train)


def with_noise(units: Sequence[LocalUnit]) -> Sequence[LocalUnit]:
    """Gives contexts weights with which they change something, as training does."""
    torch.manual_seed(1)
    for unit in units:
        for weight in unit.context.parameters() if unit.context is not None else ():
            nn.init.normal_(weight, std=0.1)
    return units


@pytest.mark.parametrize(
    ("shape", "in_shape"),
    [
        ((3, 32, 32), (64, 32, 32)),
        ((3, 32, 32), (16, 16, 16)),
        ((3, 32, 32), (16, 2, 2)),
        ((3, 32, 32), (16, 1, 1)),
        ((1, 28, 28), (8, 6, 6)),
        ((1, 33, 7), (8, 4, 7)),
        ((3, 8, 8), (8, 20, 20)),
        ((4, 50), (8, 7)),
        ((2, 9, 8, 7), (8, 4, 4, 1)),
        ((1, 50, 9), (8, 3, 4)),
    ],
)
def test_map_gets_an_encoding_of_its_size_that_sees_every_number(
    shape: tuple[int, ...], in_shape: tuple[int, ...]
) -> None:
    context = build_context(InputSpec(shape=shape), in_shape, 0)
    for weight in context.parameters():
        nn.init.uniform_(weight, 0.1, 1.0)
    sample_N = torch.randn(2, *shape, requires_grad=True)
    encoded = context(sample_N)
    assert encoded.shape == (2, *in_shape)
    encoded.sum().backward()
    assert bool((sample_N.grad > 0).all())
    assert max(context.encoder.conv.kernel_size) <= LARGEST_KERNEL


@pytest.mark.parametrize(
    ("inputs", "in_shape"),
    [
        (InputSpec(shape=(3, 9, 9)), (16,)),
        (InputSpec(shape=(3, 40)), (16, 5, 5)),
        (InputSpec(shape=(10,), dtype="float32"), (16,)),
        (InputSpec(shape=(10,), dtype="float32"), (16, 7)),
        (InputSpec(shape=(20,), dtype="int32", num_tokens=50), (16, 20)),
        (InputSpec(shape=(20,), dtype="int32", num_tokens=50), (16,)),
    ],
)
def test_input_of_other_sides_gets_one_vector_for_all_places(inputs: InputSpec, in_shape: tuple[int, ...]) -> None:
    context = build_context(inputs, in_shape, 0)
    for weight in context.parameters():
        nn.init.normal_(weight)
    x_N = torch.randn(4, *in_shape)
    added = context.added_to(x_N, stand_ins.noise(inputs, 4)) - x_N
    assert added.shape == x_N.shape
    assert torch.allclose(added.flatten(2), added.flatten(2)[..., :1], atol=1e-5) if len(in_shape) > 1 else True
    assert not torch.allclose(added[0], added[1])


def test_unit_begins_as_without_a_context_and_its_first_step_changes_that() -> None:
    units, plain = make_units(), make_units(TrainConfig())
    assert [unit.context is None for unit in units] == [True, False, False]
    assert all(unit.context is None for unit in plain)
    torch.manual_seed(0)
    x_NCHW, y_N = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizers = [make_optimizer(unit, SAMPLE, 0.1) for unit in units]
    losses = train_step(units, optimizers, x_NCHW, y_N, "fp32", sample_N=x_NCHW)
    plain_optimizers = [make_optimizer(unit, SAMPLE, 0.1) for unit in plain]
    assert losses == train_step(plain, plain_optimizers, x_NCHW, y_N, "fp32")
    assert all(bool(unit.context.encoder.conv.weight.any()) for unit in units[1:])
    assert {"context.encoder.conv.weight", "context.encoder.conv.bias"} <= units[1].state_dict().keys()


def test_context_adds_without_changing_the_input() -> None:
    unit = with_noise(make_units())[1]
    x_NCHW, sample_N = torch.randn(4, 8, 16, 16), torch.randn(4, 3, 16, 16)
    x_NCHW = torch.randn(4, *cut_convnet().out_shapes[1])
    before = x_NCHW.clone()
    entered_NCHW = unit.entered(x_NCHW, sample_N)
    assert torch.equal(x_NCHW, before)
    torch.testing.assert_close(entered_NCHW, x_NCHW + unit.context(sample_N))
    assert torch.equal(unit.features(x_NCHW, sample_N), unit(x_NCHW, sample_N)[0])


@pytest.mark.parametrize("segment_layers", [0, 1])
def test_gradients_are_those_of_backpropagation_through_the_sum(segment_layers: int) -> None:
    unit = with_noise(make_units(unit_layers=2, segment_layers=segment_layers))[1].train()
    x_NCHW, sample_N = torch.randn(4, *cut_convnet().out_shapes[1]), torch.randn(4, 3, 16, 16)
    want, bare = copy.deepcopy(unit), copy.deepcopy(unit)
    unit(x_NCHW, sample_N)[1].square().sum().backward()
    bare.context = None
    bare(x_NCHW + want.context(sample_N))[1].square().sum().backward()
    pairs = [(unit.context, want.context), (unit.layers, bare.layers)]
    for got, wanted in pairs:
        for ours, theirs in zip(got.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_mixed_batch_mixes_its_samples_alike() -> None:
    unit = with_noise(make_units())[1]
    x_NCHW, sample_N = torch.randn(4, *cut_convnet().out_shapes[1]), torch.randn(4, 3, 16, 16)
    mix, y_N, seen = Mix(order_N=torch.tensor([1, 0, 3, 2]), share=0.25), torch.arange(4), []
    unit.context.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train_step([unit], [make_optimizer(unit, SAMPLE, 0.1)], x_NCHW, y_N, "fp32", mix=mix, sample_N=sample_N)
    torch.testing.assert_close(seen[0], 0.25 * sample_N + 0.75 * sample_N[mix.order_N])


def test_same_seed_gives_the_same_weights_wherever_units_are_built() -> None:
    every = make_units()
    (alone,) = build_units(cut_convnet(), "adaptive", even_spans(6, 2), CLASSES, 0, units=range(1, 2), train=SAMPLE)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, every[1].state_dict()[name])
    plain = make_units(TrainConfig())[1].state_dict()
    assert all(torch.equal(tensor, every[1].state_dict()[name]) for name, tensor in plain.items())
    assert make_units()[1].trained().state_dict().keys() == every[1].state_dict().keys()


def real_peak(
    units: Sequence[LocalUnit], shape: tuple[int, ...], cfg: TrainConfig, frozen: FrozenUnits | None
) -> int:
    """Trains copies for real, two steps, as a worker holds its batch: the sample until the step ends."""
    units = [copy.deepcopy(unit).train() for unit in units]
    optimizers = [make_optimizer(unit, cfg, 0.01) for unit in units]
    meter = LiveBytes(CPU)
    meter.track(*units, *([] if frozen is None else [frozen]))
    with meter:
        for _ in range(2):
            y_N, mix = torch.zeros(24, dtype=torch.int64), draw_mix(cfg.mixup, 24, CPU)
            sample_N = laid_out(torch.randn(24, *IMAGES.shape))
            is_sample = shape == IMAGES.shape
            x_N = [sample_N if is_sample else laid_out(torch.randn(24, *shape))]
            if frozen is not None:
                x_N = [frozen.output(x_N.pop(), sample_N)]
            train_step(units, optimizers, x_N.pop(), y_N, cfg.precision, mix=mix, sample_N=sample_N)
            del y_N, mix, sample_N
    return meter.peak_bytes


@pytest.mark.parametrize(
    ("first", "segment_layers", "precision", "mixup"),
    [
        (0, 0, "fp32", 0.0),
        (0, 0, "bf16", 0.2),
        (1, 0, "fp32", 0.2),
        (1, 0, "bf16", 0.0),
        (1, 1, "fp32", 0.0),
        (1, 1, "bf16", 0.2),
        (2, 0, "fp32", 0.0),
        (2, 0, "bf16", 0.0),
    ],
)
def test_predicted_peak_equals_that_of_real_training(
    first: int, segment_layers: int, precision: str, mixup: float
) -> None:
    cfg = TrainConfig(context="sample", precision=precision, mixup=mixup)
    units = make_units(cfg, 2, segment_layers)[first : first + 2]
    inputs = IMAGES if first == 0 else numbers(cut_convnet().out_shapes[2 * first - 1])
    predicted = StepProbe(units, inputs, train=cfg, device=CPU, sample=IMAGES).peak_bytes(24)
    assert predicted == pytest.approx(real_peak(units, inputs.shape, cfg, None), rel=0.001)


@pytest.mark.parametrize("source", [0, 1])
def test_predicted_peak_with_layers_run_again_equals_that_of_real_training(source: int) -> None:
    units = make_units(unit_layers=1)
    inputs = IMAGES if source == 0 else numbers(cut_convnet().out_shapes[source - 1])
    frozen, trained = units[source : source + 2], units[source + 2 : source + 4]
    probe = StepProbe(trained, inputs, train=SAMPLE, device=CPU, frozen=frozen, sample=IMAGES)
    again = FrozenUnits(copy.deepcopy(frozen), "fp32")
    assert probe.peak_bytes(24) == pytest.approx(real_peak(trained, inputs.shape, SAMPLE, again), rel=0.001)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_kind_of_sample_is_predicted_as_it_trains(name: str, precision: str) -> None:
    kind, cfg = KINDS[name], TrainConfig(context="sample", precision=precision)
    cut_model = cut(kind.build(), kind.inputs)
    spans = even_spans(len(cut_model.layers), 1)
    units = [unit.train() for unit in build_units(cut_model, "adaptive", spans, kind.target, 0, train=cfg)]
    predicted = StepProbe(units, kind.inputs, train=cfg, device=CPU, target=kind.target, sample=kind.inputs)
    optimizers, meter = [make_optimizer(unit, cfg, 0.01) for unit in units], LiveBytes(CPU)
    want = predicted.peak_bytes(12)
    meter.track(*units)
    with meter:
        for _ in range(2):
            y_N = stand_ins.labels(kind.target, 12)
            sample_N = laid_out(stand_ins.noise(kind.inputs, 12))
            train_step(units, optimizers, sample_N, y_N, cfg.precision, sample_N=sample_N)
            del y_N, sample_N
    assert want == pytest.approx(meter.peak_bytes, rel=0.002)


def config_for(budget: str = "64MiB", name: str = "convnet", cache: str = "auto", **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": name},
            "memory": {"budget_bytes": budget, "join_threshold": 0.0},
            "train": {"device": "cpu", "context": "sample", **train},
            "storage": {"cache": cache},
        }
    )


def job_for(cfg: RunConfig, inputs: InputSpec = IMAGES) -> PlanJob:
    model = build_model(cfg.model.name, inputs=inputs, num_outputs=10, seed=0)
    return PlanJob(
        cfg=cfg,
        memory=cfg.memory,
        budgets=(cfg.memory.budget_bytes,),
        cap_name="memory.max_batch_size",
        cut_model=cut(model, inputs),
        inputs=inputs,
        target=CLASSES,
        split_rows={"train": 900, "val": 100},
        device=CPU,
    )


@pytest.mark.parametrize("train", [{}, {"precision": "bf16", "mixup": 0.2}])
def test_estimates_are_near_whole_steps(train: dict[str, object]) -> None:
    job = job_for(config_for(**train), replace(IMAGES, shape=(3, 32, 32)))
    last = job.num_layers
    spans = [UnitSpan(0, 1), UnitSpan(2, 3), UnitSpan(4, 5), UnitSpan(1, last), UnitSpan(2, last - 1, 2)]
    estimated, whole = job.estimate(spans), job.profile(spans)
    for estimate, profile in zip(estimated, whole, strict=True):
        assert estimate.context_params == profile.context_params
        assert estimate.context_flops == profile.context_flops
        assert estimate.resident_bytes == pytest.approx(profile.resident_bytes, abs=64)
        for batch_size in (2, 32, 128):
            assert 0.92 < estimate.peak_bytes(batch_size) / profile.peak_bytes(batch_size) < 1.15


def test_profile_says_what_the_context_adds() -> None:
    job = job_for(config_for())
    first, second = job.profile(even_spans(6, 3))
    assert (first.context_params, first.context_flops) == (0, 0)
    channels, *sides = job.ends[3].shape
    stride = 16 // sides[0]
    weights = channels * 3 * max(3, stride) ** 2
    assert second.context_params == weights + channels
    assert second.context_flops == 2 * weights * math.prod(sides)


def test_stored_rows_count_the_sample_beside_the_activations() -> None:
    job = job_for(config_for())
    plain = replace(job, cfg=config_for(context="none"))
    assert job.row_bytes(2) == plain.row_bytes(2) + math.prod(IMAGES.shape)
    assert job.stored_bytes(2) == job.stored_rows * job.row_bytes(2)
    wide = replace(job, inputs=replace(IMAGES, dtype="float32"))
    assert wide.row_bytes(2) == plain.row_bytes(2) + 4 * math.prod(IMAGES.shape)


@pytest.mark.parametrize("cache", ["shards", "recompute"])
def test_every_block_of_a_plan_is_predicted_as_it_trains(cache: str) -> None:
    job = job_for(config_for("3MiB", cache=cache, unit_layers=1))
    (proposal,) = propose(job.cfg.train, job.num_layers, 128, lambda span, size: True)
    draft = with_sources(job, verify_draft(job, draft_plan(job, proposal, job.profile(proposal.spans))), None, None)
    assert len(draft.blocks) > 2
    assert any(block.recomputed for block in draft.blocks) == (cache == "recompute")
    for block in draft.blocks:
        begin = draft.blocks[block.source_block + 1].units[0]
        units = job.units(proposal.spans, range(begin, block.units[1]))
        frozen, own = units[: block.units[0] - begin], units[block.units[0] - begin :]
        probe = StepProbe(
            own, job.ends[begin], train=job.cfg.train, device=CPU, target=CLASSES, frozen=frozen, sample=IMAGES
        )
        assert probe.peak_bytes(block.batch_size) == block.predicted_peak_bytes <= 3 * 2**20
        assert block.shard_bytes in (0, job.stored_bytes(block.layers[1]))


def test_plan_that_is_timed_prices_contexts_and_says_where_they_change_nothing() -> None:
    make = {"inputs": IMAGES, "target": CLASSES, "split_rows": {"train": 900, "val": 100}}
    local = make_plan(config_for("3MiB", local="layer"), **make)
    assert [unit.context_params > 0 for unit in local.units] == [unit.start > 0 for unit in local.units]
    assert len(local.units) > 1
    assert local.predicted_s
    whole = make_plan(config_for("64MiB", unit_layers=100), **make)
    assert "train.context sample without effect: one unit" in whole.blocks[0].reason


def test_flipped_maps_beside_samples_that_are_not_are_refused() -> None:
    check_context(TrainConfig(context="sample", augment="flip"), IMAGES)
    with pytest.raises(ConfigError, match=r"feature_augment flip .*train.context sample(.|\n)*Fix: --set"):
        check_context(TrainConfig(context="sample", feature_augment="flip"), IMAGES)
    check_context(TrainConfig(feature_augment="flip"), IMAGES)


def test_samples_of_more_sides_than_there_are_convolutions_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(1, 4, 4, 4, 4\), want at most 3 sides"):
        check_context(SAMPLE, InputSpec(shape=(1, 4, 4, 4, 4)))
    check_context(TrainConfig(), InputSpec(shape=(1, 4, 4, 4, 4)))


class Spoils(nn.Sequential):
    """A network whose first layer changes its input in place."""

    def nf_layers(self) -> list[nn.Module]:
        return list(self)


def test_layer_that_changes_its_networks_input_in_place_is_refused() -> None:
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    for inplace in (False, True):
        first = nn.Sequential(nn.Identity(), nn.ReLU(inplace), nn.Conv2d(3, 4, 3))
        cut_model = cut(Spoils(first, nn.Conv2d(4, 4, 3), end), IMAGES)
        if not inplace:
            check_sample_stays(cut_model)
            continue
        with pytest.raises(ConfigError, match=r"changes the network's input in place(.|\n)*Fix: remove inplace"):
            check_sample_stays(cut_model)


def test_samples_are_needed_by_contexts_alone_among_defaults() -> None:
    assert needs_samples(SAMPLE)
    assert not needs_samples(TrainConfig())


@pytest.mark.parametrize("num_layers", [2, 5, 6])
def test_exit_model_returns_what_units_returned_in_training(num_layers: int) -> None:
    units = with_noise(make_units(unit_layers=1))[:num_layers]
    for unit in units:
        unit.eval()
    pixels_NCHW = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    final = ExitModel([unit.trained() for unit in units], IMAGES, CLASSES).eval()
    sample_N = final.normalise(pixels_NCHW)
    wanted = forward_block(units, sample_N, "fp32", with_heads=True, sample_N=sample_N)[1]
    torch.testing.assert_close(final(pixels_NCHW), wanted[-1])
    found = all_logits(final, [unit.head for unit in units[:-1]], range(1, num_layers), pixels_NCHW)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_loaded_exit_model_has_its_contexts_where_they_were() -> None:
    units = with_noise(make_units(unit_layers=2))
    final = ExitModel(units, IMAGES, CLASSES).eval()
    assert final.enters_at == (2, 4)
    spec = ExitSpec(
        model="convnet", inputs=IMAGES, target=CLASSES, head="adaptive", num_layers=6, contexts=final.enters_at
    )
    loaded = build_exit_model(spec)
    loaded.load_state_dict(final.state_dict())
    pixels_NCHW = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded(pixels_NCHW), final(pixels_NCHW))
    assert count_params(loaded) == sum(count_params(part) for part in (*final.layers, final.head, final.contexts))


def test_costs_of_an_exit_count_the_contexts_up_to_it() -> None:
    make = {"inputs": IMAGES, "target": CLASSES, "split_rows": {"train": 900, "val": 100}}
    plan = make_plan(config_for("64MiB", unit_layers=2), **make)
    plain = make_plan(config_for("64MiB", unit_layers=2, context="none"), **make)
    assert exit_costs(plan, 3).heads == exit_costs(plain, 3).heads
    extra = [own - bare for own, bare in zip(exit_costs(plan, 3).layers, exit_costs(plain, 3).layers, strict=True)]
    first, second, third = (unit.context_flops for unit in plan.units)
    assert extra == [first, second, second + third]
    assert first == 0 < third
