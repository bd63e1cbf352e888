"""The registry and the user's own factories."""

import sys
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.registry import REGISTRY
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

COLOUR, GREY = (3, 32, 32), (1, 32, 32)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, shape=COLOUR, num_classes=10, seed=0):
    return build_model(name, inputs=InputSpec(shape=shape), num_outputs=num_classes, seed=seed)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("channels", [1, 4])
def test_registry_model_maps_images_of_any_depth_to_classes(name, channels):
    model = build(name, (channels, 32, 32), num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ResNets at 32x32 have published sizes; VGG: torchvision's features (14,723,136 for 16 layers) + 512*10 + 10.
@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("vgg11_bn", 9_231_114),
        ("vgg13_bn", 9_416_010),
        ("vgg16_bn", 14_728_266),
        ("vgg19_bn", 20_040_522),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("mobilenet_v2", 2_236_682),
        ("convnet", 288_746),
    ],
)
def test_registry_model_has_the_known_number_of_weights(name, num_params):
    assert count(build(name)) == num_params


@pytest.mark.parametrize(("size", "map_size"), [(32, 32), (64, 64), (96, 24)])
def test_resnet_stem_keeps_small_images_whole(size, map_size):
    model = build("resnet18", (3, size, size))
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool).eval()
    assert stem(torch.randn(1, 3, size, size)).shape == (1, 64, map_size, map_size)


@pytest.mark.parametrize(("size", "map_size"), [(32, 32), (64, 64), (96, 48)])
def test_mobilenet_stem_keeps_small_images_whole(size, map_size):
    model = build("mobilenet_v2", (3, size, size)).eval()
    assert model.features[0](torch.randn(1, 3, size, size)).shape == (1, 32, map_size, map_size)


@pytest.mark.parametrize(("size", "map_size"), [(4, 2), (8, 2), (28, 7), (32, 8), (6, 3)])
def test_convnet_pools_twice_unless_the_map_gets_too_small(size, map_size):
    model = build("convnet", (1, size, size)).eval()
    assert model.features(torch.randn(1, 1, size, size)).shape == (1, 128, map_size, map_size)


@pytest.mark.parametrize("name", REGISTRY)
def test_registry_model_runs_and_trains_at_its_smallest_size(name):
    size = REGISTRY[name].min_size
    model = build(name, (3, size, size)).train()
    logits = model(torch.randn(2, 3, size, size))
    logits.sum().backward()
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", REGISTRY)
def test_image_below_the_smallest_size_is_an_error(name):
    size = REGISTRY[name].min_size
    with pytest.raises(ConfigError, match=f"got images of {size - 1}x64 pixels, want {size}x{size} or more") as e:
        build(name, (3, size - 1, 64))
    assert f"--image-size {size}" in str(e.value)


@pytest.mark.parametrize("name", ["convnet", "vgg11_bn", "resnet18", "mobilenet_v2"])
def test_same_seed_gives_the_same_weights_whatever_was_drawn_before(name):
    first = build(name, seed=5)
    torch.rand(3)
    again, other = build(name, seed=5), build(name, seed=6)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    convs = [[m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (first, other)]
    assert not any(torch.equal(a, b) for a, b in zip(*convs, strict=True))


def test_build_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    build("convnet", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", REGISTRY)
def test_initial_logits_are_small_enough_to_train(name):
    model = build(name).train()
    logits = model(torch.randn(16, *COLOUR, generator=torch.Generator().manual_seed(0)))
    assert logits.abs().max() < 10


def test_model_under_fake_mode_allocates_nothing():
    before = torch.get_rng_state()
    with FakeTensorMode():
        model = build("vgg19_bn")
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shape", "num_train", "name"),
    [
        ((1, 8, 8), 50_000, "convnet"),
        ((1, 28, 28), 50_000, "convnet"),
        ((3, 32, 32), 50_000, "vgg11_bn"),
        ((3, 32, 31), 50_000, "convnet"),
        ((3, 224, 224), 999, "convnet"),
        ((3, 224, 224), 1000, "vgg11_bn"),
    ],
)
def test_suggested_model_suits_the_data(shape, num_train, name):
    assert suggest_model(InputSpec(shape=shape), num_train) == name
    build(name, shape)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet81", "resnet18"), ("vgg16", "vgg16_bn"), ("transformer", "package.module:factory")],
)
def test_unknown_name_lists_near_ones(name, hint):
    with pytest.raises(ConfigError, match=f"--model {name}: unknown model") as error:
        build(name)
    assert hint in error.value.fix


# --- factories


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A module of user-written factories that is importable for one test."""
    (tmp_path / "own_models.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def _net(channels, classes):
                return nn.Sequential(
                    nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(4, classes),
                )

            class Net(nn.Module):
                def __init__(self, num_classes, image_shape, width=1):
                    super().__init__()
                    self.net = _net(image_shape[0], num_classes)
                def forward(self, x):
                    return self.net(x)

            def classes_only(num_classes): return _net(3, num_classes)
            def anything(**options): return _net(options["image_shape"][0], options["num_classes"])
            def nothing(): return _net(3, 10)
            def lazy(num_classes):
                return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))

            def of_tokens(num_tokens, input_shape, num_outputs):
                length = input_shape[0]
                return nn.Sequential(nn.Embedding(num_tokens, 4), nn.Flatten(), nn.Linear(4 * length, num_outputs))

            def fails(num_classes): raise KeyError("no such width")
            def needs_more(num_classes, depth): return _net(3, num_classes)
            def returns_dict(num_classes): return _net(3, num_classes).state_dict()
            def wrong_outputs(): return _net(3, 1000)
            def map_output(num_classes): return nn.Conv2d(3, num_classes, 3)
            def tuple_output(num_classes): return nn.MaxPool2d(2, return_indices=True)
            def double(num_classes): return _net(3, num_classes).double()
            def half_meta(num_classes): return _net(3, num_classes).to("meta")
            def crashes_on_input(num_classes): return _net(5, num_classes)
            not_callable = 3
            """
        )
    )
    (tmp_path / "broken_models.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.parametrize("factory", ["Net", "classes_only", "anything", "nothing", "lazy"])
def test_factory_gets_what_it_accepts(own_models, factory):
    model = build(f"own_models:{factory}").eval()
    assert model(torch.randn(2, *COLOUR)).shape == (2, 10)


def test_factory_is_told_the_shape_of_the_images(own_models):
    assert build("own_models:Net", GREY, num_classes=4).eval()(torch.randn(2, *GREY)).shape == (2, 4)


@pytest.mark.parametrize("factory", ["Net", "lazy"])
def test_factory_model_has_seeded_weights(own_models, factory):
    first, again, other = (build(f"own_models:{factory}", seed=seed) for seed in (3, 3, 4))
    weights = [next(model.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "no_such_package:make",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        (
            "own_models:make",
            "cannot be imported: AttributeError: module 'own_models' has no attribute 'make'",
        ),
        ("broken_models:make", "cannot be imported: ZeroDivisionError"),
        (":make", "cannot be imported: ValueError"),
        ("own_models:", "cannot be imported: AttributeError"),
        ("own_models:not_callable", "got int, want a function"),
        ("own_models:fails", "the factory fails: KeyError: 'no such width'"),
        ("own_models:needs_more", "the factory fails: TypeError"),
        ("own_models:returns_dict", "the factory returns OrderedDict, want a torch.nn.Module"),
        ("own_models:wrong_outputs", "got outputs of shape (1000,), want (10,)"),
        ("own_models:map_output", "got outputs of shape (10, 30, 30), want (10,)"),
        ("own_models:tuple_output", "returns tuple for 2 samples, want one tensor"),
        ("own_models:crashes_on_input", "the model fails on an input of shape (2, 3, 32, 32): RuntimeError"),
        ("own_models:double", "torch.float64 on cpu, want torch.float32 on cpu"),
        ("own_models:half_meta", "torch.float32 on meta, want torch.float32 on cpu"),
    ],
)
def test_bad_factory_is_an_error_with_the_reason(own_models, name, reason):
    with pytest.raises(ConfigError) as error:
        build(name)
    assert str(error.value).startswith(f"--model {name}: ")
    assert reason in str(error.value) and error.value.fix


def test_factory_model_under_fake_mode_is_fake(own_models):
    with FakeTensorMode():
        model = build("own_models:Net")
    assert all(isinstance(p, FakeTensor) for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 40), (1, 4), (2, 9, 8, 7), (1, 4, 4, 4)])
def test_convnet_takes_series_and_volumes(shape):
    inputs = InputSpec(shape=shape, dtype="float32")
    model = build_model("convnet", inputs=inputs, num_outputs=5, seed=0)
    out_NK = model(torch.randn(3, *shape))
    out_NK.sum().backward()
    assert out_NK.shape == (3, 5)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv3d)]) == 6


@pytest.mark.parametrize("name", ["convnet", "vgg11_bn", "resnet18", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize(
    "inputs",
    [
        InputSpec(shape=(20,), dtype="int32", num_tokens=9),
        InputSpec(shape=(20,), dtype="float32"),
        InputSpec(shape=(3, 20), dtype="float32"),
    ],
)
def test_what_a_network_does_not_take_is_refused_with_its_shape(name, inputs):
    if name == "convnet" and len(inputs.shape) == 2:
        return
    with pytest.raises(
        ConfigError, match=rf"--model {name}: got samples of shape \({inputs.shape[0]},.*want "
    ) as error:
        build_model(name, inputs=inputs, num_outputs=5, seed=0)
    assert "package.module:factory" in error.value.fix


def test_series_that_are_too_short_are_refused():
    with pytest.raises(ConfigError, match="got samples of 3, want 4 or more"):
        build_model("convnet", inputs=InputSpec(shape=(2, 3), dtype="float32"), num_outputs=5, seed=0)


@pytest.mark.parametrize("shape", [(3, 4000), (1, 64, 64, 64)])
def test_series_and_volumes_get_the_convnet(shape):
    assert suggest_model(InputSpec(shape=shape, dtype="float32"), 10**6) == "convnet"


@pytest.mark.parametrize("num_tokens", [0, 50])
def test_vectors_and_tokens_have_no_default_network(num_tokens):
    with pytest.raises(ConfigError, match=r"none is the default for samples of shape \(20,\)") as error:
        suggest_model(InputSpec(shape=(20,), dtype="float32", num_tokens=num_tokens), 10**6)
    assert "--model package.module:factory" in error.value.fix


def test_factory_may_ask_for_tokens_and_outputs_by_name(own_models):
    inputs = InputSpec(shape=(20,), dtype="int32", num_tokens=50)
    model = build_model("own_models:of_tokens", inputs=inputs, num_outputs=3, seed=0)
    assert (model[0].num_embeddings, model[2].out_features) == (50, 3)
    assert model[2].in_features == 20 * 4
