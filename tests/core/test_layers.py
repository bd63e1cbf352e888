"""The cut: equal to the uncut model, sensible layers, and a clear error for everything else."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.models import build_model
from nf_pipeline.core.registry import REGISTRY
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

COLOUR, GREY, LARGE, DIGIT = (3, 32, 32), (1, 32, 32), (3, 64, 64), (1, 8, 8)
REGISTRY_CASES = [
    (name, shape)
    for name, entry in REGISTRY.items()
    for shape in (COLOUR, GREY, LARGE, DIGIT)
    if min(shape[1:]) >= entry.min_size
]
# mobilenet_v2 has dropout: its classifier is random in train mode.
WITHOUT_DROPOUT = [(name, COLOUR) for name in REGISTRY if name != "mobilenet_v2"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Functional(nn.Module):
    """A plain chain whose activations, pools and reshapes are function and method calls."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.avg_pool2d(torch.relu(self.conv3(x)), 4)
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


class HandResidual(nn.Module):
    """Residual connections written out in the model's own forward pass."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.b1 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(self.down(x))
        y = self.bn(self.b1(x))
        y += x
        return self.fc(F.relu(y).mean([2, 3]))


class Bottle(nn.Module):
    """A block with a skip only where the shape allows one, like MobileNetV2's."""

    def __init__(self, channels, width):
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, width, 1)
        self.skip = channels == width

    def forward(self, x):
        out = self.project(F.relu(self.expand(x)))
        return x + out if self.skip else out


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Bottle(8, 8), Bottle(8, 16), Bottle(16, 16)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Wrapper(nn.Module):
    """A classifier around a backbone that is a module of its own."""

    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = backbone or Backbone()
        self.fc = nn.Linear(16, 5)

    def forward(self, x, scale=None):
        x = self.backbone(x)
        if scale is not None:
            x = x * scale
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PlainBlock(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class Stage(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.first, self.second = Bottle(channels, width), Bottle(width, width)

    def forward(self, x):
        return self.second(self.first(x))


class SkipAroundPlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = PlainBlock(3, 8), PlainBlock(8, 8), PlainBlock(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.one(x)
        x = x + self.two(x)
        return self.fc(self.three(x).mean((2, 3)))


class WeightStandardised(nn.Module):
    """A convolution that uses its own parameter and buffer through functions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.register_buffer("scale", torch.full((8, 1, 1, 1), 0.5))
        self.conv = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.scale
        x = F.relu(F.conv2d(x, weight, padding=1))
        return self.fc(F.relu(self.conv(x)).amax((2, 3)))


class SharedActivations(nn.Module):
    """One ReLU and one pool module for the whole network: without weights, they may be shared."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 5))

    def forward(self, x):
        return self.head(self.pool(self.relu(self.conv2(self.pool(self.relu(self.conv1(x)))))))


class LongSkip(nn.Module):
    """Joins the first features to the last ones, up to the last convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        return self.fc(self.c(torch.cat([a, b], 1)).mean((2, 3)))


class JoinedFeatures(LongSkip):
    """Joins pooled features of two depths: the second layer gives a vector, straight to the classifier."""

    def __init__(self):
        super().__init__()
        del self.c
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.fc(torch.cat([a.mean((2, 3)), self.b(a).mean((2, 3))], 1))


class InPlaceInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x.sub_(0.5)
        return self.fc(self.conv(x).mean((2, 3)))


class SplitChannels(nn.Module):
    """Convolves half of its channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        a, b = F.relu(self.stem(x)).chunk(2, 1)
        return self.fc(self.last(torch.cat([a, self.part(b)], 1)).mean((2, 3)))


class OwnNorm(nn.GroupNorm):
    """Takes its weights by itself: they wait for the operation, which is no skip connection."""

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias)


class NormBlock(Bottle):
    """Holds two modules of a class whose weights wait; it is a block all the same."""

    def __init__(self, channels, width):
        super().__init__(channels, width)
        self.norm1, self.norm2 = OwnNorm(2, 2 * channels), OwnNorm(2, width)

    def forward(self, x):
        out = self.norm2(self.project(F.relu(self.norm1(self.expand(x)))))
        return x + out if self.skip else out


class NormBlocks(Backbone):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([NormBlock(8, 8), NormBlock(8, 16), NormBlock(16, 16)])
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(super().forward(x).mean((2, 3)))


HAND_WRITTEN = {
    Functional: ["conv1", "conv2", "conv3"],
    HandResidual: ["stem", "a1", "down", "b1"],
    Wrapper: ["backbone.stem", "backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2"],
    SkipAroundPlainBlock: ["one.conv1", "one.conv2", "two.conv1", "three.conv1", "three.conv2"],
    WeightStandardised: ["weight", "conv"],
    SharedActivations: ["conv1", "conv2"],
    LongSkip: ["a", "b", "c"],
    JoinedFeatures: ["a", "b"],
    InPlaceInput: ["conv"],
    SplitChannels: ["stem", "part", "last"],
    NormBlocks: ["stem", "blocks.0", "blocks.1", "blocks.2"],
}


def run(cut_model: CutModel, x: torch.Tensor) -> torch.Tensor:
    for layer in cut_model.layers:
        x = layer(x)
    return cut_model.tail(x)


def images(shape, num=3):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(7))


def assert_same_training_step(model: nn.Module, shape) -> None:
    """Compares outputs, gradients and buffers of one step of the uncut and the cut model in train mode."""
    twin = copy.deepcopy(model)
    pieces = cut(twin, InputSpec(shape=shape))
    model.train(), pieces.whole().train()
    want, got = model(images(shape)), run(pieces, images(shape))
    assert torch.equal(got, want)
    want.square().sum().backward(), got.square().sum().backward()
    for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name
    for (name, mine), (_, other) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize(("name", "shape"), REGISTRY_CASES)
def test_cut_of_a_registry_model_equals_the_uncut_one_in_evaluation(name, shape):
    model = build_model(name, inputs=InputSpec(shape=shape), num_outputs=7, seed=1).eval()
    pieces = cut(model, InputSpec(shape=shape))
    with torch.no_grad():
        assert torch.equal(run(pieces, images(shape)), model(images(shape)))


@pytest.mark.parametrize(("name", "shape"), WITHOUT_DROPOUT)
def test_cut_of_a_registry_model_trains_as_the_uncut_one(name, shape):
    assert_same_training_step(build_model(name, inputs=InputSpec(shape=shape), num_outputs=7, seed=1), shape)


def test_cut_model_with_dropout_draws_the_same_random_numbers_in_training():
    model = build_model("mobilenet_v2", inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1).train()
    pieces = cut(copy.deepcopy(model), InputSpec(shape=COLOUR))
    torch.manual_seed(3)
    want = model(images(COLOUR))
    torch.manual_seed(3)
    assert torch.equal(run(pieces, images(COLOUR)), want)


@pytest.mark.parametrize(
    ("name", "num_layers"),
    [
        ("convnet", 6),
        ("vgg11_bn", 8),
        ("vgg13_bn", 10),
        ("vgg16_bn", 13),
        ("vgg19_bn", 16),
        ("resnet18", 9),
        ("resnet34", 17),
        ("resnet50", 17),
        ("mobilenet_v2", 19),
    ],
)
def test_registry_model_has_a_layer_per_convolution_or_block(name, num_layers):
    model = build_model(name, inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1)
    assert len(cut(model, InputSpec(shape=COLOUR)).layers) == num_layers


@pytest.mark.parametrize("name", REGISTRY)
def test_out_shapes_and_names_describe_the_layers(name):
    model = build_model(name, inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1).eval()
    pieces, x = cut(model, InputSpec(shape=COLOUR)), images(COLOUR)
    paths = dict(model.named_modules())
    for layer, layer_name, shape in zip(pieces.layers, pieces.names, pieces.out_shapes, strict=True):
        x = layer(x)
        assert tuple(x.shape[1:]) == shape
        assert layer_name in paths
    assert len(set(pieces.names)) == len(pieces.names)


def test_vgg_layer_keeps_its_norm_activation_and_pool():
    pieces = cut(
        build_model("vgg11_bn", inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1), InputSpec(shape=COLOUR)
    )
    assert set(pieces.layers[0].state_dict()) == {
        "features.0.weight",
        "features.0.bias",
        *(f"features.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert pieces.out_shapes[0] == (64, 16, 16)
    assert set(pieces.tail.state_dict()) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2"])
def test_cut_shares_every_weight_and_buffer_with_the_model_once(name):
    model = build_model(name, inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1)
    whole = cut(model, InputSpec(shape=COLOUR)).whole()
    for kind in (nn.Module.parameters, nn.Module.buffers):
        mine, theirs = [id(t) for t in kind(whole)], [id(t) for t in kind(model)]
        assert sorted(mine) == sorted(theirs)


@pytest.mark.parametrize("cls", HAND_WRITTEN, ids=lambda cls: cls.__name__)
def test_hand_written_model_is_cut_where_one_value_crosses(cls):
    model = cls()
    assert list(cut(model, InputSpec(shape=COLOUR)).names) == HAND_WRITTEN[cls]


@pytest.mark.parametrize("cls", HAND_WRITTEN, ids=lambda cls: cls.__name__)
def test_hand_written_model_trains_cut_as_uncut(cls):
    torch.manual_seed(0)
    assert_same_training_step(cls(), COLOUR)


def test_stage_of_blocks_is_no_block():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), Stage(8, 8), Stage(8, 16))
    model = Wrapper(backbone)
    assert cut(model, InputSpec(shape=COLOUR)).names == (
        "backbone.0",
        *("backbone.1.first", "backbone.1.second", "backbone.2.first", "backbone.2.second"),
    )
    assert_same_training_step(model, COLOUR)


def test_sequential_model_is_cut():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(8, 8, 3), nn.Flatten())
    model.append(nn.Linear(8 * 28 * 28, 5))
    assert cut(model, InputSpec(shape=COLOUR)).names == ("0", "3")


def test_cut_restores_each_modules_mode_and_the_global_random_state():
    model = build_model("vgg11_bn", inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1).train()
    model.features[1].eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    means = model.features[1].running_mean.clone()
    cut(model, InputSpec(shape=COLOUR))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.features[1].running_mean, means)


@pytest.mark.parametrize("name", ["vgg19_bn", "resnet50", "mobilenet_v2"])
def test_cut_under_fake_tensors_agrees_with_the_real_one(name):
    with FakeTensorMode():
        fake = cut(build_model(name, inputs=InputSpec(shape=LARGE), num_outputs=7, seed=1), InputSpec(shape=LARGE))
        logits = run(fake, torch.empty(4, *LARGE))
    real = cut(build_model(name, inputs=InputSpec(shape=LARGE), num_outputs=7, seed=1), InputSpec(shape=LARGE))
    assert (fake.names, fake.out_shapes) == (real.names, real.out_shapes)
    assert logits.shape == (4, 7)
    for mine, other in zip(fake.layers, real.layers, strict=True):
        assert list(mine.state_dict()) == list(other.state_dict())


def test_cut_on_the_meta_device_gives_shapes():
    with torch.device("meta"):
        pieces = cut(
            build_model("resnet18", inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1), InputSpec(shape=COLOUR)
        )
    assert pieces.out_shapes[-1] == (512, 4, 4)


def test_layers_can_be_exported():
    model = build_model("resnet18", inputs=InputSpec(shape=COLOUR), num_outputs=7, seed=1).eval()
    whole = cut(model, InputSpec(shape=COLOUR)).whole()
    exported = torch.export.export(whole, (images(COLOUR),))
    assert torch.allclose(exported.module()(images(COLOUR)), model(images(COLOUR)), atol=1e-5)


# --- what cannot be cut


class Net(nn.Module):
    """Three convolutions and a classifier; the subclasses each do one thing that a cut cannot keep."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.fc(F.relu(self.c(self.middle(self.b(F.relu(self.a(x)))))).mean((2, 3)))


class DataDependent(Net):
    def middle(self, x):
        return x if x.mean() > 0 else -x


class ConstantDropout(Net):
    def middle(self, x):
        return F.dropout(x, 0.3)


class ModeBranch(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else logits.softmax(1)


class MadeOnTheWay(Net):
    def middle(self, x):
        return x + torch.arange(8.0).view(1, -1, 1, 1)


class TupleOutput(Net):
    def forward(self, x):
        x = self.a(x)
        return self.fc(x.mean((2, 3))), x


class DictOutput(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class SkipToTheEnd(Net):
    def forward(self, x):
        a = F.relu(self.a(x))
        return self.fc(self.c(self.b(a)).mean((2, 3))) + a.mean((1, 2, 3)).unsqueeze(1)


class SharedModule(Net):
    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))
        return self.fc(x.mean((2, 3)))


class TiedWeights(Net):
    def __init__(self):
        super().__init__()
        self.c.weight = self.b.weight  # one parameter under two names


class SharedNorm(Net):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        return self.fc(self.bn(self.b(self.bn(self.a(x)))).mean((2, 3)))


class NoConvolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 5))


class NoClassifier(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 30))


class SecondInput(Net):
    def forward(self, x, y):
        return super().forward(x) + y


class IgnoresInput(Net):
    def forward(self, x):
        return self.fc(self.a.weight.mean((1, 2, 3)))


class Stateful(Net):
    calls = 0

    def middle(self, x):
        self.calls += 1
        return x * self.calls


class Noise(Net):
    def middle(self, x):
        return x + torch.rand_like(x)


class TypeBranch(Net):
    """Tracing takes the other branch without noticing."""

    def middle(self, x):
        return -x if isinstance(x, torch.Tensor) else x


class TooSmall(Net):
    def middle(self, x):
        return F.max_pool2d(x, 64)


class MixesSamples(Net):
    def forward(self, x):
        return self.fc(self.a(x).mean((0, 2, 3)))


class BadInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = DataDependent()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("cls", "reasons"),
    [
        (DataDependent, ["model DataDependent", "control flow"]),
        (BadInside, ["module inner (DataDependent)", "control flow"]),
        (ConstantDropout, ["model ConstantDropout", "dropout", "evaluation"]),
        (ModeBranch, ["model ModeBranch", "training", "evaluation", "softmax"]),
        (MadeOnTheWay, ["model MadeOnTheWay", "register it as a buffer"]),
        (TupleOutput, ["model TupleOutput", "tuple", "want one tensor"]),
        (DictOutput, ["model DictOutput", "dict", "want one tensor"]),
        (SkipToTheEnd, ["model SkipToTheEnd", "relu", "up to the classifier"]),
        (SharedModule, ["b.weight", "two layers share"]),
        (TiedWeights, ["b.weight", "c.weight", "two layers share"]),
        (SharedNorm, ["bn.running_mean", "two layers share"]),
        (NoConvolution, ["model NoConvolution", "no convolution"]),
        (NoClassifier, ["model NoClassifier", "last convolution"]),
        (SecondInput, ["model SecondInput", "missing 1 required positional argument: 'y'"]),
        (IgnoresInput, ["model IgnoresInput", "does not use its input"]),
        (Stateful, ["Stateful", "state that"]),
        (Noise, ["Noise compute something else", "random"]),
        (TypeBranch, ["TypeBranch compute something else", "fx cannot see"]),
        (TooSmall, ["TooSmall fails", "(2, 3, 32, 32)", "--image-size"]),
        (MixesSamples, ["MixesSamples returns (5,)", "a row per sample"]),
    ],
)
def test_model_that_cannot_be_cut_is_an_error_with_the_reason(cls, reasons):
    with pytest.raises(ConfigError) as caught:
        cut(cls(), InputSpec(shape=COLOUR))
    assert [reason for reason in reasons if reason not in str(caught.value)] == []
    assert "Fix:" in str(caught.value)


def test_refused_model_is_left_as_it_was():
    model = MadeOnTheWay()
    attributes = set(vars(model))
    with pytest.raises(ConfigError):
        cut(model, InputSpec(shape=COLOUR))
    assert set(vars(model)) == attributes and model.training


# --- the cut given by hand


class ByHand(DataDependent):
    """Its control flow cannot be traced, but lies inside one layer."""

    def nf_layers(self):
        self.rest = _Rest(self)
        return [nn.Sequential(self.a, nn.ReLU()), self.rest, nn.Sequential(_Mean(), self.fc)]


class _Mean(nn.Module):
    def forward(self, x):
        return F.relu(x).mean((2, 3))


class _Rest(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.b, self.c, self.middle = net.b, net.c, net.middle

    def forward(self, x):
        return self.c(self.middle(self.b(x)))


def test_layers_given_by_hand_are_taken_as_they_are():
    torch.manual_seed(0)
    model = ByHand().eval()
    pieces = cut(model, InputSpec(shape=COLOUR))
    assert pieces.out_shapes == ((8, 32, 32), (8, 32, 32))
    assert torch.equal(run(pieces, images(COLOUR)), model(images(COLOUR)))


def by_hand(modules):
    model = Net()
    model.nf_layers = lambda: modules(model)
    return model


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        (lambda m: None, "nf_layers returns NoneType, want a list of nn.Module"),
        (lambda m: [m.a, F.relu], "want a list of nn.Module"),
        (lambda m: [m.fc], "nf_layers returns 1 modules, want 2 or more"),
        (lambda m: [m.a, m.b, m.c, nn.Sequential(_Mean(), m.fc)], "compute something else than the model"),
        (lambda m: [m.b, m.a, nn.Sequential(_Mean(), m.fc)], "layer b fails on an input"),
        (lambda m: [m.a, m.b, m.b, nn.Sequential(_Mean(), m.fc)], "two layers share"),
    ],
)
def test_wrong_layers_given_by_hand_are_an_error(modules, reason):
    with pytest.raises(ConfigError, match="Fix:") as caught:
        cut(by_hand(modules), InputSpec(shape=COLOUR))
    assert reason in str(caught.value)
