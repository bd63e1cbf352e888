"""Predictions on fake tensors against bytes counted while really training."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from nf_pipeline.config import TrainConfig
from nf_pipeline.core import profiler
from nf_pipeline.core.layers import cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.mixup import draw_mix
from nf_pipeline.core.models import build_model
from nf_pipeline.core.profiler import (
    Shape,
    StepProbe,
    count_params,
    fit_line,
    forward_flops,
    probe_batch_sizes,
    profile_unit,
)
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.core.train_step import forward_block, make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.plans import UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec, TargetSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Network:
    units: list[LocalUnit]
    spans: list[UnitSpan]
    in_shapes: list[Shape]


def make_network(
    name: str, unit_layers: int, image_size: int = 32, segment_layers: int = 0, train: TrainConfig | None = None
) -> Network:
    image_shape = (3, image_size, image_size)
    model = build_model(name, inputs=InputSpec(shape=image_shape), num_outputs=NUM_CLASSES, seed=0)
    cut_model = cut(model, InputSpec(shape=image_shape))
    spans = even_spans(len(cut_model.layers), unit_layers, segment_layers)
    starts: list[Shape] = [image_shape, *cut_model.out_shapes]
    return Network(
        units=build_units(cut_model, "adaptive", spans, TargetSpec(size=NUM_CLASSES), 0, train=train),
        spans=spans,
        in_shapes=[starts[span.start] for span in spans],
    )


def ends_of(unit: LocalUnit, in_shape: Shape) -> tuple[InputSpec, InputSpec]:
    with torch.no_grad():
        out_NCHW = copy.deepcopy(unit).eval().features(torch.zeros(2, *in_shape))
    return numbers(in_shape), numbers(tuple(out_NCHW.shape[1:]))


def profile_all(network: Network, cfg: TrainConfig, batch_sizes: list[int]) -> list[UnitProfile]:
    return [
        profile_unit(unit, span, ends_of(unit, in_shape), train=cfg, device=CPU, batch_sizes=batch_sizes)
        for unit, span, in_shape in zip(network.units, network.spans, network.in_shapes, strict=True)
    ]


def predict_peak(
    units: Sequence[LocalUnit], in_shape: Shape, batch_size: int, cfg: TrainConfig, device: torch.device = CPU
) -> int:
    return StepProbe(units, numbers(in_shape), train=cfg, device=device).peak_bytes(batch_size)


@dataclass(frozen=True, kw_only=True)
class Measured:
    train_peak: int
    eval_peak: int
    resident: int


def measure(units: Sequence[LocalUnit], in_shape: Shape, batch_size: int, cfg: TrainConfig) -> Measured:
    """Trains copies for real, two steps, then validates them with the same batch size."""
    units = [copy.deepcopy(unit).train() for unit in units]
    optimizers = [make_optimizer(unit, cfg, 0.01) for unit in units]
    meter = LiveBytes(CPU)
    meter.track(*units)
    with meter:
        for _ in range(2):
            y_N = torch.zeros(batch_size, dtype=torch.int64)
            mix = draw_mix(cfg.mixup, batch_size, CPU)
            train_step(units, optimizers, laid_out(torch.randn(batch_size, *in_shape)), y_N, cfg.precision, mix=mix)
            del y_N, mix
        train_peak, resident = meter.peak_bytes, meter.current_bytes
        meter.reset_peak()
        for unit in units:
            unit.eval()
        result = forward_block(units, laid_out(torch.randn(batch_size, *in_shape)), cfg.precision, with_heads=True)
        del result
    return Measured(train_peak=train_peak, eval_peak=meter.peak_bytes, resident=resident)


CASES = [
    ("convnet", 1, 0, "fp32", 16, 8),
    ("convnet", 3, 0, "bf16", 16, 32),
    ("convnet", 6, 2, "bf16", 16, 32),
    ("vgg11_bn", 3, 0, "fp32", 32, 8),
    ("vgg11_bn", 8, 1, "fp32", 32, 8),
    ("resnet18", 3, 0, "bf16", 16, 4),
]


@pytest.mark.parametrize(("name", "unit_layers", "segment_layers", "precision", "image_size", "batch_size"), CASES)
def test_predicted_peaks_equal_those_of_real_training(
    name: str, unit_layers: int, segment_layers: int, precision: str, image_size: int, batch_size: int
) -> None:
    cfg = TrainConfig(precision=precision)
    network = make_network(name, unit_layers, image_size, segment_layers)
    middle = len(network.units) // 2
    for block in [slice(0, 1), slice(middle, middle + 1), slice(middle, middle + 2), slice(0, None)]:
        units, in_shape = network.units[block], network.in_shapes[block.start]
        predicted = predict_peak(units, in_shape, batch_size, cfg)
        measured = measure(units, in_shape, batch_size, cfg)
        assert predicted == pytest.approx(measured.train_peak, rel=0.001), block
        assert measured.eval_peak <= measured.train_peak, block


@pytest.mark.parametrize(
    ("unit_layers", "train"),
    [
        (1, {"loss": "predsim"}),
        (3, {"loss": "predsim", "precision": "bf16", "mixup": 0.2}),
        (2, {"mixup": 0.2, "label_smoothing": 0.1}),
    ],
)
def test_predicted_peaks_equal_those_of_real_training_whatever_the_loss(
    unit_layers: int, train: dict[str, object]
) -> None:
    cfg = TrainConfig.model_validate(train)
    network = make_network("convnet", unit_layers, 32, train=cfg)
    for block in [slice(0, 1), slice(1, 2), slice(0, None)]:
        units, in_shape = network.units[block], network.in_shapes[block.start]
        predicted, measured = predict_peak(units, in_shape, 24, cfg), measure(units, in_shape, 24, cfg)
        assert predicted == pytest.approx(measured.train_peak, rel=0.001), block


def memtracker_peak(units: Sequence[LocalUnit], in_shape: Shape, batch_size: int, cfg: TrainConfig) -> int:
    """The second step's peak as torch's own tracker counts it, on fake tensors."""
    units = [copy.deepcopy(unit).to("meta").train() for unit in units]
    with FakeTensorMode(allow_non_fake_inputs=True):
        units = [unit.to_empty(device="cpu") for unit in units]
        optimizers = [make_optimizer(unit, cfg, 0.01) for unit in units]
        tracker = MemTracker()
        tracker.track_external(*units, *optimizers)
        with tracker:
            for _ in range(2):
                y_N = torch.zeros(batch_size, dtype=torch.int64)
                train_step(units, optimizers, laid_out(torch.zeros(batch_size, *in_shape)), y_N, cfg.precision)
                tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.mark.parametrize(
    ("name", "unit_layers", "precision"),
    [("convnet", 1, "bf16"), ("vgg11_bn", 3, "fp32")],
)
def test_predictions_equal_those_of_torchs_memtracker(name: str, unit_layers: int, precision: str) -> None:
    cfg = TrainConfig(precision=precision)
    network = make_network(name, unit_layers)
    for block in [slice(0, 1), slice(1, 3), slice(2, 3)]:
        units, in_shape = network.units[block], network.in_shapes[block.start]
        predicted = predict_peak(units, in_shape, 16, cfg)
        assert predicted == memtracker_peak(units, in_shape, 16, cfg), block


def test_resident_bytes_are_weights_buffers_and_momentum() -> None:
    network = make_network("convnet", 3, 16)
    cfg = TrainConfig()
    unit = network.units[0]
    resident_bytes = StepProbe([unit], numbers((3, 16, 16)), train=cfg, device=CPU).resident_bytes
    weights = sum(parameter.nbytes for parameter in unit.parameters())
    loss_bytes = 4
    assert resident_bytes == 2 * weights + sum(buffer.nbytes for buffer in unit.buffers()) + loss_bytes
    assert resident_bytes == measure([unit], (3, 16, 16), 4, cfg).resident + loss_bytes


@pytest.mark.parametrize(
    ("name", "unit_layers", "precision"),
    [("convnet", 1, "bf16"), ("resnet18", 3, "fp32")],
)
def test_fitted_lines_lie_above_every_batch_and_touch_both_ends(name: str, unit_layers: int, precision: str) -> None:
    cfg = TrainConfig(precision=precision)
    network = make_network(name, unit_layers)
    profiles = profile_all(network, cfg, probe_batch_sizes(2, 128))
    assert [profile.span for profile in profiles] == network.spans
    for profile, unit, in_shape in zip(profiles, network.units, network.in_shapes, strict=True):
        probe = StepProbe([unit], numbers(in_shape), train=cfg, device=CPU)
        gaps = {size: profile.peak_bytes(size) - probe.peak_bytes(size) for size in (2, 9, 40, 128)}
        assert gaps[2] == 0
        assert 0 <= gaps[128] < 126  # the slope is rounded up
        assert min(gaps.values()) == 0


def test_a_block_takes_at_most_the_bytes_added_up_from_its_units() -> None:
    network = make_network("convnet", 1)
    cfg = TrainConfig()
    profiles = profile_all(network, cfg, [2, 16, 64])
    for start, stop in [(0, 2), (1, 4), (2, 6)]:
        exact = predict_peak(network.units[start:stop], network.in_shapes[start], 24, cfg)
        resident = sum(profile.resident_bytes for profile in profiles[start:stop])
        added_up = resident + max(unit.peak_bytes(24) - unit.resident_bytes for unit in profiles[start:stop])
        assert exact <= added_up <= 1.1 * exact


@pytest.mark.parametrize("largest", [0, 1, 16])
def test_steps_that_run_out_of_memory_count_as_more_than_the_device_has(
    monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    # No step on a CPU raises this error; the GPU's own is tested where there is one.
    def limited_step(
        units: object, optimizers: object, x_NCHW: torch.Tensor, *rest: object, **options: object
    ) -> list[torch.Tensor]:
        if len(x_NCHW) > largest:
            raise torch.OutOfMemoryError
        return train_step(units, optimizers, x_NCHW, *rest, **options)

    monkeypatch.setattr(profiler, "train_step", limited_step)
    monkeypatch.setattr(profiler, "total_bytes", lambda _: 10**9)
    network = make_network("convnet", 3, 16)
    probe = StepProbe(network.units[:1], numbers((3, 16, 16)), train=TrainConfig(), device=CPU)
    assert (probe.resident_bytes > 10**9) == (largest < 2)
    assert probe.peak_bytes(17) == 10**9 + 1
    assert (probe.peak_bytes(16) > 10**9) == (largest < 16)


def test_profiling_leaves_the_units_as_they_are() -> None:
    network = make_network("convnet", 3, 16)
    unit = network.units[0]
    before = {name: tensor.clone() for name, tensor in unit.state_dict().items()}
    predict_peak([unit], (3, 16, 16), 64, TrainConfig())
    assert unit.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in unit.state_dict().items())
    assert all(parameter.grad is None for parameter in unit.parameters())


def test_profiling_takes_none_of_the_memory_it_predicts() -> None:
    network = make_network("convnet", 3, 16)
    predicted = predict_peak(network.units, (3, 16, 16), 10**8, TrainConfig())
    assert predicted > 10 * 2**40


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"), [(2, 128, [2, 65, 128]), (2, 2, [2, 3, 4]), (4, 8, [4, 6, 8])]
)
def test_probes_span_the_batches_that_a_plan_may_choose(smallest: int, largest: int, expected: list[int]) -> None:
    assert probe_batch_sizes(smallest, largest) == expected


def test_an_exact_line_is_found_exactly() -> None:
    assert fit_line({5: 1016, 2: 1007, 100: 1301}) == (3, 1001)


def test_a_fit_is_raised_above_a_probe_that_a_kernel_made_larger() -> None:
    assert fit_line({2: 100, 3: 150, 4: 120}) == (10, 120)


points = st.dictionaries(st.integers(1, 500), st.integers(0, 10**10), min_size=2, max_size=5)


@given(points)
def test_no_point_lies_above_its_fit_and_one_lies_on_it(peak_bytes: dict[int, int]) -> None:
    slope, intercept = fit_line(peak_bytes)
    assert slope >= 0
    assert min(slope * size + intercept - peak for size, peak in peak_bytes.items()) == 0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=5),
    st.integers(2, 5),
    st.integers(3, 60),
)
def test_the_fit_of_a_maximum_of_lines_is_exact_at_the_smallest_batch_and_never_below(
    lines: list[tuple[int, int]], smallest: int, span: int
) -> None:
    def peak_at(size: int) -> int:
        return max(slope * size + constant for slope, constant in lines)

    probes = probe_batch_sizes(smallest, smallest + span)
    slope, intercept = fit_line({size: peak_at(size) for size in probes})
    assert slope * smallest + intercept == peak_at(smallest)
    assert all(slope * size + intercept >= peak_at(size) for size in range(smallest, smallest + span + 1))


def test_flops_of_a_convolution_and_a_linear_layer_are_twice_their_multiply_adds() -> None:
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert forward_flops([convolution, head], numbers((3, 6, 6))) == [2 * 3 * 9 * 8 * 36, 2 * 8 * 5]


def test_head_params_and_flops_are_those_of_the_head_alone() -> None:
    network = make_network("convnet", 6, 16)
    unit = LocalUnit(list(network.units[0].layers), nn.Sequential(nn.Flatten(), nn.LazyLinear(7)))
    in_shape = network.in_shapes[0]
    out_NCHW, _ = unit(torch.zeros(2, *in_shape))
    features = out_NCHW[0].numel()
    profile = profile_unit(
        unit, UnitSpan(0, 6), ends_of(unit, in_shape), train=TrainConfig(), device=CPU, batch_sizes=[2, 8]
    )
    assert profile.head_params == count_params(unit.head) == features * 7 + 7
    assert profile.head_flops == 2 * features * 7


class Nonzero(nn.Module):
    """Its output's shape depends on values."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return x_NCHW * x_NCHW.nonzero().shape[0]


def test_a_model_whose_memory_depends_on_values_is_a_config_error() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    unit = LocalUnit([nn.Sequential(Nonzero(), nn.Conv2d(3, 4, 1))], head)
    with pytest.raises(ConfigError, match="cannot be predicted"):
        predict_peak([unit], (3, 8, 8), 2, TrainConfig())


@pytest.mark.gpu
def test_gpu_profile_is_at_least_the_tensor_bytes() -> None:
    network = make_network("convnet", 3, 16)
    for unit, in_shape in zip(network.units, network.in_shapes, strict=True):
        tensors = predict_peak([unit], in_shape, 16, TrainConfig())
        measured = predict_peak([unit], in_shape, 16, TrainConfig(), CUDA)
        assert measured >= 0.9 * tensors


@pytest.mark.gpu
def test_what_a_gpu_cannot_hold_counts_as_more_than_it_has_and_leaves_nothing() -> None:
    unit = make_network("convnet", 3, 16).units[0]
    too_much = torch.cuda.get_device_properties(CUDA).total_memory + 1
    probe = StepProbe([unit], numbers((3, 16, 16)), train=TrainConfig(), device=CUDA)
    small_peak = probe.peak_bytes(8)
    assert probe.peak_bytes(10**9) == too_much
    assert probe.peak_bytes(8) == pytest.approx(small_peak, rel=0.01)
    del probe
    huge = StepProbe([unit], numbers((3, 200_000, 200_000)), train=TrainConfig(), device=CUDA)
    assert huge.resident_bytes == huge.peak_bytes(2) == too_much


@pytest.mark.gpu
def test_gpu_profiling_lifts_the_cap_of_an_earlier_training() -> None:
    unit = make_network("convnet", 3, 16).units[0]
    torch.cuda.set_per_process_memory_fraction(0.0, torch.cuda.current_device())
    assert predict_peak([unit], (3, 16, 16), 8, TrainConfig(), CUDA) < 2**30
