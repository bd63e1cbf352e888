"""Texts, series, volumes and vectors, classes and values: cut, predicted, planned and exported like pictures."""

import copy

import pytest
import torch
from sample_kinds import KINDS, Kind
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nf_pipeline.config import RunConfig, TrainConfig
from nf_pipeline.core import stand_ins
from nf_pipeline.core.drafts import PlanJob
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.core.heads import HEADS, build_head, head_site
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.mixup import draw_mix
from nf_pipeline.core.planner import make_plan
from nf_pipeline.core.probe import has_values, probe_input, run_probe
from nf_pipeline.core.profiler import StepProbe
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BATCH = 12


def cut_of(kind: Kind) -> CutModel:
    return cut(kind.build(), kind.inputs)


def units_of(kind: Kind, train: TrainConfig, unit_layers: int = 1) -> list[LocalUnit]:
    cut_model = cut_of(kind)
    spans = even_spans(len(cut_model.layers), unit_layers)
    return build_units(cut_model, train.head, spans, kind.target, 0, train=train)


def stored_samples(inputs: InputSpec, num: int = BATCH) -> torch.Tensor:
    """As they lie in a store."""
    values = stand_ins.noise(inputs, num)
    return values.to(torch.int32) if inputs.num_tokens else (100 * values).to(getattr(torch, inputs.dtype))


@pytest.mark.parametrize(
    ("name", "layers", "shapes"),
    [
        ("words", ("embedding", "conv1", "conv2"), ((12, 20), (16, 20), (24, 20))),
        ("encoder", ("0", "1", "2"), ((8, 20), (8, 20), (8, 20))),
        ("series", tuple(f"features.conv{i}" for i in range(6)), ((32, 40), (32, 20), (64, 20), (64, 10))),
        ("volume", tuple(f"features.conv{i}" for i in range(6)), ((32, 8, 8, 8), (32, 4, 4, 4), (64, 4, 4, 4))),
        ("vector", ("0", "1"), ((32,), (32,))),
    ],
)
def test_network_is_cut_where_channels_come_first(
    name: str, layers: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    cut_model = cut_of(KINDS[name])
    assert cut_model.names == layers
    assert cut_model.out_shapes[: len(shapes)] == shapes


@pytest.mark.parametrize("name", ["words", "encoder", "volume", "vector"])
def test_every_head_stands_on_every_layer(name: str) -> None:
    kind = KINDS[name]
    shapes = cut_of(kind).out_shapes
    for head in HEADS:
        for layer_idx, shape in enumerate(shapes[:-1]):
            built = build_head(head, head_site(shapes, layer_idx, kind.target.size), 0)
            assert built(torch.randn(3, *shape)).shape == (3, kind.target.size)


class Unembedded(nn.Module):
    """Takes tokens to convolutions by way of what the tracer may not know."""

    def __init__(self, turn: nn.Module, hidden: int = 0) -> None:
        super().__init__()
        self.embedding, self.turn = nn.Embedding(50, 12), turn
        self.hidden = nn.ModuleList(nn.Linear(12, 12) for _ in range(hidden))
        self.conv, self.classifier = nn.Conv1d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        x_NLC = self.embedding(tokens_NL)
        for layer in self.hidden:
            x_NLC = layer(x_NLC)
        return self.classifier(self.conv(self.turn(x_NLC)).mean(2))


class Permute(nn.Module):
    def forward(self, x_NLC: torch.Tensor) -> torch.Tensor:
        return x_NLC.permute(0, 2, 1)


class Transpose(nn.Module):
    def forward(self, x_NLC: torch.Tensor) -> torch.Tensor:
        return x_NLC.mT


class Opaque(nn.Module):
    """Its operations depend on shapes, so that it is kept whole."""

    def forward(self, x_NLC: torch.Tensor) -> torch.Tensor:
        return x_NLC.transpose(1, 2) if x_NLC.shape[1] else x_NLC


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize(("turn", "shapes"), [(Permute, 2), (Transpose, 2), (Opaque, 1)])
def test_no_layer_ends_between_an_embedding_and_its_transposition(
    turn: type[nn.Module], shapes: int, hidden: int
) -> None:
    # What turned the axes inside a module that was not entered shows with the convolution only: it is one layer.
    cut_model = cut(Unembedded(turn(), hidden), KINDS["words"].inputs)
    assert cut_model.out_shapes == ((12, 20), (8, 20))[-shapes:]


class Encoder(nn.Module):
    """Attention, which no tracer enters."""

    def __init__(self, num_blocks: int, *, convolves: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.table = nn.Embedding(50, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks, self.classifier = nn.TransformerEncoder(block, num_blocks), nn.Linear(8, 4)
        self.convolves = convolves

    def forward(self, x_N: torch.Tensor) -> torch.Tensor:
        x_NLC = self.conv(x_N).transpose(1, 2) if self.convolves else self.table(x_N)
        return self.classifier(self.blocks(x_NLC).mean(1))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("words", "it has no convolution"),
        ("series", "2 blocks .* follow its last convolution, and 1 layers come before"),
    ],
)
def test_attention_that_nobody_cut_is_refused_with_how_to_cut_it(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        cut(Encoder(2, convolves=name == "series"), KINDS[name].inputs)
    assert "nf_layers(self)" in error.value.fix and "channels first" in error.value.fix


def test_recurrent_layers_after_the_last_convolution_are_the_classifiers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3)
            self.lstm, self.linear = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
            hidden_NLC, _ = self.lstm(self.conv2(self.conv1(x_NCL)).transpose(1, 2))
            return self.linear(hidden_NLC[:, -1])

    cut_model = cut(Recurrent(), KINDS["series"].inputs)
    assert cut_model.out_shapes == ((8, 38), (8, 36))
    assert [name for name, _ in cut_model.tail.named_children()] == ["lstm", "linear"]


def test_probes_are_the_same_tokens_every_time_and_zeros_where_weights_are_fake() -> None:
    inputs, model = KINDS["words"].inputs, nn.Embedding(50, 4)
    before = torch.get_rng_state()
    first, again = probe_input(model, inputs), probe_input(model, inputs)
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.int64 and 0 <= first.min() < first.max() < 50
    with FakeTensorMode():
        fake = probe_input(nn.Embedding(50, 4), inputs)
    assert (fake.dtype, tuple(fake.shape)) == (torch.int64, (2, 20))


def test_sequences_whose_attention_exceeds_the_machine_are_refused_before_they_allocate() -> None:
    class Pairs(nn.Module):
        def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
            x_NLC = x_NCL.transpose(1, 2)
            return x_NLC @ x_NCL @ x_NLC

    with pytest.raises(ConfigError, match=r"MemoryError: its activations take .*, this machine has"):
        run_probe("layer 0", Pairs(), torch.zeros(2, 1, 800_000))


@pytest.mark.parametrize("failure", [ValueError, SystemExit])
def test_layer_that_fails_on_fake_tensors_alone_is_tried_as_it_is(failure: type[BaseException]) -> None:
    class OnRealTensorsOnly(nn.Module):
        def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
            if not has_values(x_NF):
                raise failure(1)
            return x_NF + 1.0

    assert torch.equal(run_probe("layer 0", OnRealTensorsOnly(), torch.zeros(2, 3)), torch.ones(2, 3))


def trained_peak(units: list[LocalUnit], kind: Kind, cfg: TrainConfig) -> int:
    """Trains copies for real, two steps, under the worker's meter."""
    units = [copy.deepcopy(unit).train() for unit in units]
    optimizers = [make_optimizer(unit, cfg, 0.01) for unit in units]
    meter = LiveBytes(CPU)
    meter.track(*units)
    with meter:
        for _ in range(2):
            y_N = stand_ins.labels(kind.target, BATCH)
            mix = draw_mix(cfg.mixup, BATCH, CPU)
            x_N = [laid_out(stand_ins.noise(kind.inputs, BATCH))]
            train_step(units, optimizers, x_N.pop(), y_N, cfg.precision, mix=mix)
            del y_N, mix
    return meter.peak_bytes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_peak_equals_that_of_real_training(name: str, precision: str) -> None:
    kind, cfg = KINDS[name], TrainConfig(precision=precision)
    units = units_of(kind, cfg, 2)
    predicted = StepProbe(units, kind.inputs, train=cfg, device=CPU, target=kind.target).peak_bytes(BATCH)
    assert predicted == pytest.approx(trained_peak(units, kind, cfg), rel=0.002)


@pytest.mark.parametrize("name", ["series, values", "vector, values"])
def test_predicted_peak_of_mixed_values_equals_that_of_real_training(name: str) -> None:
    kind, cfg = KINDS[name], TrainConfig(mixup=0.3, loss="huber")
    units = units_of(kind, cfg)
    predicted = StepProbe(units, kind.inputs, train=cfg, device=CPU, target=kind.target).peak_bytes(BATCH)
    assert predicted == pytest.approx(trained_peak(units, kind, cfg), rel=0.001)


def plan_config(kind: Kind, budget: str = "1MiB", **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": kind.model},
            "memory": {"budget_bytes": budget, "max_batch_size": 32},
            "train": {"device": "cpu", **train},
        }
    )


@pytest.mark.parametrize(("name", "head"), [("words", "auto"), ("encoder", "adaptive"), ("vector, values", "auto")])
def test_plan_within_the_budget_is_found_and_keeps_its_specs(name: str, head: str) -> None:
    kind = KINDS[name]
    plan = make_plan(
        plan_config(kind, "120KiB", head=head, local="layer"),
        inputs=kind.inputs,
        target=kind.target,
        split_rows={"train": 900, "val": 100},
    )
    assert (plan.inputs, plan.target) == (kind.inputs, kind.target)
    assert len(plan.units) == len(plan.layers) and plan.predicted_s > 0
    assert all(block.predicted_peak_bytes <= 120 * 2**10 and block.batch_size >= 2 for block in plan.blocks)


@pytest.mark.parametrize("name", ["words", "series, values", "encoder"])
def test_estimated_bytes_are_near_those_of_whole_steps(name: str) -> None:
    kind = KINDS[name]
    cfg, cut_model = plan_config(kind), cut_of(kind)
    job = PlanJob(
        cfg=cfg,
        memory=cfg.memory,
        budgets=(cfg.memory.budget_bytes,),
        cap_name="memory.max_batch_size",
        cut_model=cut_model,
        inputs=kind.inputs,
        target=kind.target,
        split_rows={"train": 900},
        device=CPU,
    )
    spans = even_spans(len(cut_model.layers), 1)
    first, *others = zip(job.estimate(spans), job.profile(spans), strict=True)
    estimate, exact = (profile.peak_bytes(32) for profile in first)
    assert estimate == pytest.approx(exact, rel=0.02)  # whose input is int64 tokens, or float32
    for pair in others:
        estimate, exact = (profile.peak_bytes(32) for profile in pair)
        assert 0.9 * exact < estimate < 1.25 * exact


@pytest.mark.parametrize(
    ("name", "train", "what"),
    [
        ("words", {"mixup": 0.2}, r"train\.mixup 0\.2 mixes numbers, and samples are tokens"),
        ("series", {"augment": "flip"}, r"train\.augment flip wants pictures .*float32 of shape \(3, 40\)"),
        ("volume", {"feature_augment": "flip"}, r"train\.feature_augment flip wants pictures"),
    ],
)
def test_changes_that_samples_cannot_take_are_refused_when_planning(name: str, train: dict, what: str) -> None:
    kind = KINDS[name]
    with pytest.raises(ConfigError, match=what) as error:
        make_plan(
            plan_config(kind, **train), inputs=kind.inputs, target=kind.target, split_rows={"train": 90, "val": 10}
        )
    assert "--set train." in error.value.fix


@pytest.mark.parametrize(("dtype", "channels"), [("uint16", 1), ("float32", 3), ("uint8", 4)])
def test_colours_change_on_grey_and_rgb_images_of_8_bits_only(dtype: str, channels: int) -> None:
    inputs = InputSpec(shape=(channels, 8, 8), dtype=dtype)
    with pytest.raises(ConfigError, match=r"color wants uint8 images of 1 or 3 channels") as error:
        make_plan(
            plan_config(KINDS["series"], augment="color"),
            inputs=inputs,
            target=TargetSpec(size=4),
            split_rows={"train": 90, "val": 10},
        )
    assert "crop_flip" in error.value.fix


def exit_model_of(kind: Kind) -> ExitModel:
    layers = cut_of(kind).layers
    unit = LocalUnit(layers[:1], build_head("adaptive", head_site(cut_of(kind).out_shapes, 0, kind.target.size), 0))
    return ExitModel([unit], kind.inputs, kind.target).eval()


@pytest.mark.parametrize("name", KINDS)
def test_exit_model_takes_stored_samples_and_is_the_same_exported(name: str) -> None:
    kind = KINDS[name]
    model, stored = exit_model_of(kind), stored_samples(kind.inputs)
    with torch.no_grad():
        out_NK = model(stored)
        batch = {0: torch.export.Dim("batch", min=2)}
        exported = torch.export.export(model, (stored[:3],), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(stored), out_NK)
    assert out_NK.shape == (BATCH, kind.target.size) and out_NK.dtype == torch.float32


def test_exit_model_returns_values_in_their_own_units() -> None:
    kind = KINDS["vector, values"]
    model = exit_model_of(kind)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        out_NK = model(stored_samples(kind.inputs))
    assert torch.equal(out_NK, torch.tensor([10.0, -1.0]).expand(BATCH, 2))
    assert torch.equal(model.own_units.standardised(torch.tensor([[15.0, -2.0]])), torch.tensor([[1.0, -2.0]]))


@pytest.mark.parametrize(
    ("inputs", "stored", "wanted"),
    [
        (InputSpec(shape=(2,), dtype="int32", num_tokens=9), torch.tensor([[3, 8]], dtype=torch.int32), [[3, 8]]),
        (InputSpec(shape=(2,), dtype="float32"), torch.tensor([[3.0, 8.5]]), [[3.0, 8.5]]),
        (
            InputSpec(shape=(2, 1), dtype="uint16", mean=(60000.0, 0.0), std=(2.0, 4.0)),
            torch.tensor([[[65000], [8]]], dtype=torch.uint16),
            [[[2500.0], [2.0]]],
        ),
    ],
)
def test_samples_become_what_the_network_takes(inputs: InputSpec, stored: torch.Tensor, wanted: list) -> None:
    spec = ExitSpec(model="", inputs=inputs, target=TargetSpec(size=2), head="linear", num_layers=1)
    model = ExitModel([LocalUnit([nn.Identity()], nn.Identity())], spec.inputs, spec.target)
    got = model.normalise(stored)
    assert got.tolist() == wanted
    assert got.dtype == (torch.int64 if inputs.num_tokens else torch.float32)


def test_exit_model_of_a_registered_network_is_built_from_its_spec_alone() -> None:
    kind = KINDS["volume"]
    spec = ExitSpec(model="convnet", inputs=kind.inputs, target=kind.target, head="adaptive", num_layers=2)
    trained, fresh = build_exit_model(spec), build_exit_model(spec)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    fresh.load_state_dict(trained.state_dict())
    stored = stored_samples(kind.inputs)
    assert torch.equal(fresh(stored), trained(stored))
