"""Modules whose operations cannot be recorded stay one operation each, in a network that is cut all the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nf_pipeline.core.layers import cut
from nf_pipeline.core.trace import trace_model
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

SHAPE = (3, 16, 16)


class StochasticDepth(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)


class OwnNorm(nn.Module):
    """Weights, and another computation in evaluation."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        mean = x.mean((0, 2, 3)) if self.training else self.mean
        return (x - mean.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1)


class SamePadding(nn.Conv2d):
    """Pads by what the shape of its input asks for."""

    def forward(self, x):
        missing = max((x.shape[-1] - 1) // 2 * 2 + 3 - x.shape[-1], 0)
        return super().forward(F.pad(x, [missing // 2, missing - missing // 2] * 2))


class Blur(nn.Module):
    """Makes its filter on the way."""

    def forward(self, x):
        return x * torch.tensor([0.5, 0.25, 0.5, 1.0]).view(1, -1, 1, 1)


class ModeInside(nn.Module):
    """A residual block that does more in training."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = x + self.two(F.relu(self.one(x)))
        return x.clamp(-1, 1) if self.training else x


class FunctionalDropout(nn.Module):
    """The mode is only handed on: in a block, and in the network itself."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        x = self.two(F.dropout2d(F.relu(self.one(x)), 0.5, self.training))
        return self.fc(F.dropout(x.mean((2, 3)), p=0.5, training=self.training))


def network(*middle):
    head = (nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, *head)


@pytest.mark.parametrize(
    ("middle", "names"),
    [
        ((StochasticDepth(),), ("0", "2")),
        ((OwnNorm(4),), ("0", "2")),
        ((SamePadding(4, 4, 3, stride=2),), ("0", "1", "2")),
        ((Blur(),), ("0", "2")),
        ((ModeInside(4), ModeInside(4)), ("0", "1", "2", "3")),
    ],
    ids=lambda value: type(value[0]).__name__,
)
def test_module_that_cannot_be_entered_stays_one_operation(middle, names):
    torch.manual_seed(0)
    model = network(*middle)
    assert set(trace_model(model).kept_whole) == {type(middle[0])}
    cut_model = cut(model, InputSpec(shape=SHAPE))
    assert cut_model.names == names
    assert_same_in_both_modes(model, cut_model)


def assert_same_in_both_modes(model, cut_model):
    x = torch.randn(2, *SHAPE)
    for is_training in (True, False):
        logits = []
        for module in (model.train(is_training), cut_model.whole().train(is_training)):
            torch.manual_seed(1)
            logits.append(module(x))
        assert torch.equal(*logits)


def test_mode_that_is_only_handed_on_is_the_one_that_the_layer_has_when_it_runs():
    torch.manual_seed(0)
    model = FunctionalDropout()
    recording = trace_model(model)
    assert recording.kept_whole == {}
    assert [node.target for node in recording.graph.nodes].count("training") == 2
    cut_model = cut(model, InputSpec(shape=SHAPE))
    assert cut_model.names == ("one", "two")
    assert_same_in_both_modes(model, cut_model)
    x = torch.randn(2, *SHAPE)
    layer = cut_model.layers[0]
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_module_that_acts_in_evaluation_alone_is_found_though_another_one_differs_first():
    class Clamp(nn.Module):
        def forward(self, x):
            return x if self.training else x.clamp(-1, 1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x) + x

    recording = trace_model(network(Clamp(), Twice(), Twice()))
    assert set(recording.kept_whole) == {Clamp}


def test_network_that_can_be_entered_is_recorded_operation_by_operation():
    recording = trace_model(network(nn.Dropout(0.5)))
    assert recording.kept_whole == {}
    assert [node.op for node in recording.graph.nodes] == ["placeholder", *["call_module"] * 6, "output"]


def test_network_whose_maps_stay_channels_last_is_refused_with_the_place():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1)
            x = x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.fc(x.mean((1, 2)))

    with pytest.raises(
        ConfigError, match=r"its channels are the last axis from permute on, and heads take them first"
    ):
        cut(ChannelsLast(), InputSpec(shape=SHAPE))


def test_cut_leaves_no_layer_between_a_permutation_and_the_one_back():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    cut_model = cut(network(ChannelsLast()), InputSpec(shape=SHAPE))
    assert cut_model.names == ("0", "1.mix", "2")
    assert cut_model.out_shapes == ((4, 16, 16), (4, 16, 16), (8, 16, 16))
