"""Units: layers with a head at the end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

SHAPE = (1, 8, 8)


def cut_convnet(seed=0):
    return cut(
        build_model("convnet", inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=seed), InputSpec(shape=SHAPE)
    )


def units_of(unit_layers=2, seed=0, units=None, head="adaptive"):
    return build_units(cut_convnet(seed), head, even_spans(6, unit_layers), TargetSpec(size=10), seed, units)


def state_of(unit):
    return {name: tensor.clone() for name, tensor in unit.state_dict().items()}


def assert_same_state(one, other):
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@given(num_layers=st.integers(1, 60), unit_layers=st.integers(1, 70))
def test_spans_cover_all_layers_once_in_order(num_layers, unit_layers):
    spans = even_spans(num_layers, unit_layers)
    assert [layer for span in spans for layer in range(span.start, span.stop)] == list(range(num_layers))
    assert all(span.stop - span.start == unit_layers for span in spans[:-1])
    assert 1 <= spans[-1].stop - spans[-1].start <= unit_layers


@pytest.mark.parametrize(("unit_layers", "lengths"), [(1, [1] * 6), (3, [3, 3]), (4, [4, 2]), (99, [6])])
def test_units_hold_the_layers_in_order(unit_layers, lengths):
    cut_model = cut_convnet()
    units = build_units(cut_model, "adaptive", even_spans(6, unit_layers), TargetSpec(size=10), 0)
    assert [len(unit.layers) for unit in units] == lengths
    assert [layer for unit in units for layer in unit.layers] == list(cut_model.layers)


def test_last_unit_has_the_models_own_classifier():
    cut_model = cut_convnet()
    units = build_units(cut_model, "adaptive", even_spans(6, 2), TargetSpec(size=10), 0)
    assert units[-1].head is cut_model.tail
    assert [type(unit.head).__name__ for unit in units[:-1]] == ["Sequential"] * 2


def test_chained_units_end_with_the_uncut_models_logits():
    model = build_model("convnet", inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=0).eval()
    x = images = torch.randn(3, *SHAPE)
    for unit in build_units(cut(model, InputSpec(shape=SHAPE)), "adaptive", even_spans(6, 2), TargetSpec(size=10), 0):
        x, logits = unit.eval()(x)
        assert logits.shape == (3, 10)
    assert torch.equal(logits, model(images))


def test_units_own_loss_reaches_all_its_weights_and_its_input():
    unit = units_of()[1].train()
    x = torch.randn(4, 32, 4, 4, requires_grad=True)
    out, logits = unit(x)
    logits.square().sum().backward()
    assert out.requires_grad and x.grad is not None
    assert all(p.grad is not None for p in unit.parameters())


@pytest.mark.parametrize("head", ["adaptive", "classic", "mlp_sr"])
def test_some_units_built_alone_equal_those_built_together(head):
    together, alone = units_of(head=head), units_of(head=head, units=range(1, 3))
    assert len(alone) == 2
    for one, other in zip(together[1:], alone, strict=True):
        assert_same_state(state_of(one), state_of(other))


def test_heads_of_two_units_and_of_two_seeds_differ():
    weights = [unit.head.conv.weight for seed in (0, 1) for unit in units_of(1, seed=seed)[2:4]]
    same_shape = [w for w in weights if w.shape == weights[0].shape]
    assert len(same_shape) == 4
    assert len({tuple(w.flatten().tolist()) for w in same_shape}) == 4


def test_names_in_the_state_dict_are_stable():
    assert list(units_of()[1].state_dict()) == [
        "layers.0.features.conv2.weight",
        *_bn("layers.0.features.bn2"),
        "layers.1.features.conv3.weight",
        *_bn("layers.1.features.bn3"),
        "head.conv.weight",
        *_bn("head.bn"),
        "head.linear.weight",
        "head.linear.bias",
    ]


def _bn(path):
    return [f"{path}.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def test_state_of_a_unit_loads_into_a_fresh_one():
    trained, fresh = units_of(seed=1)[0], units_of(seed=2)[0]
    fresh.load_state_dict(trained.state_dict())
    assert_same_state(state_of(trained), state_of(fresh))


def test_unknown_head_is_an_error():
    with pytest.raises(ConfigError, match="unknown head"):
        units_of(head="adaptiv")


def trained_once(segment_layers, steps=3):
    """Trains the convnet as one unit and returns its weights, buffers included, and its losses."""
    torch.manual_seed(0)
    unit = build_units(cut_convnet(), "adaptive", even_spans(6, 6, segment_layers), TargetSpec(size=10), 0)[0].train()
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        _, logits = unit(torch.randn(4, *SHAPE))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return state_of(unit), losses


@pytest.mark.parametrize("segment_layers", [1, 2, 4, 6, 99])
def test_checkpointing_changes_no_weight_and_no_running_statistic(segment_layers):
    plain, losses = trained_once(0)
    checkpointed, same_losses = trained_once(segment_layers)
    assert same_losses == losses
    assert_same_state(plain, checkpointed)


def test_checkpointing_keeps_less_and_computes_all_segments_but_the_last_again():
    calls = []
    for segment_layers in (0, 2):
        unit = build_units(cut_convnet(), "adaptive", even_spans(6, 6, segment_layers), TargetSpec(size=10), 0)[
            0
        ].train()
        called = []
        for idx, layer in enumerate(unit.layers):
            layer.register_forward_pre_hook(lambda *_, idx=idx, called=called: called.append(idx))
        unit(torch.randn(4, *SHAPE))[1].sum().backward()
        calls.append(sorted(called))
    assert calls == [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]]


def test_dropout_inside_a_segment_drops_the_same_when_computed_again():
    def gradient(segment_layers):
        torch.manual_seed(3)
        layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)) for _ in range(3)]
        for layer in layers:
            torch.nn.init.ones_(layer[0].weight)
        unit = LocalUnit(layers, torch.nn.Linear(8, 2), segment_layers).train()
        torch.manual_seed(4)
        unit(torch.ones(2, 8))[1].sum().backward()
        return layers[0][0].weight.grad

    assert torch.equal(gradient(1), gradient(0))
