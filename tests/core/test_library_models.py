"""Networks of torchvision and timm: built by name, cut, planned, trained and loaded again without being confirmed."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nf_pipeline import load_model, train
from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.core.layers import cut
from nf_pipeline.core.models import build_model
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

COLOUR, GREY = (3, 32, 32), (1, 32, 32)

# Family -> its smallest member, the smallest images of 32, 64, ... pixels that it takes, layers.
TORCHVISION = {
    "convnext_tiny": (32, 22),
    "densenet121": (32, 8),
    "efficientnet_b0": (32, 18),
    "googlenet": (32, 12),
    "mobilenet_v3_small": (32, 13),
    "regnet_y_400mf": (32, 17),
    "shufflenet_v2_x0_5": (32, 18),
    "squeezenet1_1": (32, 10),
}
TORCHVISION_SLOW = {
    "alexnet": (64, 5),
    "efficientnet_v2_s": (32, 42),
    "inception_v3": (96, 16),
    "mnasnet0_5": (32, 20),
    "mobilenet_v2": (32, 19),
    "mobilenet_v3_large": (32, 17),
    "resnet18": (32, 9),
    "resnext50_32x4d": (32, 17),
    "regnet_x_400mf": (32, 23),
    "vgg11_bn": (32, 8),
    "wide_resnet50_2": (32, 17),
}
TIMM = {
    "mobilenetv3_small_050": 16,
    "resnet10t": 7,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timm() -> Any:
    """The library, where it is installed: it is an extra."""
    return pytest.importorskip("timm")


def build(name: str, shape: tuple[int, int, int] = COLOUR, seed: int = 1) -> nn.Module:
    return build_model(name, inputs=InputSpec(shape=shape), num_outputs=7, seed=seed)


def images(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(7))


def assert_cut_is_whole(name: str, shape: tuple[int, int, int], num_layers: int) -> None:
    """Compares the cut with the uncut model in evaluation, and its layers with what they should be."""
    model = build(name, shape).eval()
    cut_model = cut(model, InputSpec(shape=shape))
    with torch.no_grad():
        assert torch.equal(cut_model.whole()(images(shape)), model(images(shape)))
    assert len(cut_model.layers) == num_layers
    assert all(len(out_shape) == 3 for out_shape in cut_model.out_shapes)
    assert len(set(cut_model.names)) == num_layers


@pytest.mark.parametrize(
    ("name", "size", "num_layers"),
    [
        *((name, *case) for name, case in TORCHVISION.items()),
        *(pytest.param(name, *case, marks=pytest.mark.slow) for name, case in TORCHVISION_SLOW.items()),
    ],
)
def test_cut_of_a_torchvision_family_equals_the_uncut_model(name: str, size: int, num_layers: int) -> None:
    assert_cut_is_whole(f"torchvision:{name}", (3, size, size), num_layers)


@pytest.mark.parametrize(("name", "num_layers"), TIMM.items())
def test_cut_of_a_timm_family_equals_the_uncut_model(timm: Any, name: str, num_layers: int) -> None:
    assert_cut_is_whole(f"timm:{name}", COLOUR, num_layers)


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:mobilenetv3_small_050"])
def test_same_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    before = torch.get_rng_state()
    first, again, other = build(name), build(name), build(name, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "timm:resnet10t"])
def test_grey_images_get_a_first_convolution_of_their_own(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    grey, colour = build(name, GREY).eval(), build(name).eval()
    with torch.no_grad():
        assert grey(images(GREY)).shape == (3, 7)
    stems = [next(m for m in model.modules() if isinstance(m, nn.Conv2d)) for model in (grey, colour)]
    assert [stem.in_channels for stem in stems] == [1, 3]
    assert (stems[0].stride, stems[0].padding, stems[0].bias is None) == (
        stems[1].stride,
        stems[1].padding,
        stems[1].bias is None,
    )
    assert float(stems[0].weight.detach().std()) == pytest.approx(float(stems[1].weight.detach().std()), rel=0.3)


def test_model_under_fake_mode_is_fake_and_cut_like_the_real_one() -> None:
    real = cut(build("torchvision:shufflenet_v2_x0_5", GREY), InputSpec(shape=GREY))
    with FakeTensorMode():
        model = build("torchvision:shufflenet_v2_x0_5", GREY)
        fake = cut(model, InputSpec(shape=GREY))
    assert all(isinstance(weight, FakeTensor) for weight in model.parameters())
    assert (fake.names, fake.out_shapes) == (real.names, real.out_shapes)


def test_stochastic_depth_acts_in_training_only_and_alike_in_the_cut_model() -> None:
    model = build("torchvision:efficientnet_b0")
    whole = cut(model, InputSpec(shape=COLOUR)).whole()

    def logits(module: nn.Module, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return module.train()(images(COLOUR))

    assert torch.equal(logits(whole, 3), logits(model, 3))
    assert not torch.equal(logits(whole, 3), logits(whole, 4))
    with torch.no_grad():
        assert torch.equal(whole.eval()(images(COLOUR)), whole.eval()(images(COLOUR)))


def test_googlenet_is_built_without_its_classifiers_on_the_way() -> None:
    model = build("torchvision:googlenet")
    assert not any(path.startswith("aux") for path, _ in model.named_parameters())
    assert isinstance(model.train()(images(COLOUR)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "reason", "fix"),
    [
        ("torchvision:resnet81", "unknown model", "torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "a model for detection, want one that classifies images", ""),
        ("torchvision:fcn_resnet50", "a model for segmentation, want one that classifies images", ""),
        ("torchvision:r3d_18", "a model for video, want one that classifies images", ""),
        ("torchvision:raft_small", "a model for optical flow, want one that classifies images", ""),
        ("torchvision:quantized_resnet50", "quantised", "torchvision:resnet50"),
        ("torchvision:", "unknown model", "names that torchvision lists"),
    ],
)
def test_what_torchvision_has_no_classifier_for_is_refused_with_near_names(name: str, reason: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"--model {name}: ") as caught:
        build(name)
    assert reason in caught.value.what and fix in caught.value.fix


@pytest.mark.parametrize(
    ("name", "reason", "fix"),
    [
        ("timm:resnet81", "unknown model", "timm:resnet"),
        ("timm:resnet18.a1_in1k", "names trained weights", "timm:resnet18"),
        ("timm:hf-hub:timm/resnet18", "to be downloaded", ""),
        ("timm:local-dir:/somewhere", "to be downloaded", ""),
    ],
)
def test_what_timm_does_not_list_is_refused_without_asking_the_network(
    timm: Any, monkeypatch: pytest.MonkeyPatch, name: str, reason: str, fix: str
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ConfigError) as caught:
        build(name)
    assert reason in caught.value.what and fix in caught.value.fix


def test_library_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="timm is not installed") as caught:
        build("timm:resnet18")
    assert caught.value.fix == "pip install 'nf_pipeline[timm]'"


def test_images_that_are_too_small_are_refused_with_a_size_that_works() -> None:
    with pytest.raises(ConfigError, match=r"fails on an input of shape \(2, 3, 32, 32\)") as caught:
        build("torchvision:alexnet")
    assert caught.value.fix.startswith("--image-size 64")
    build("torchvision:alexnet", (3, 64, 64))


@pytest.mark.parametrize("name", ["torchvision:swin_t", pytest.param("torchvision:vit_b_16", marks=pytest.mark.slow)])
def test_transformer_is_refused_because_its_blocks_follow_its_last_convolution(name: str) -> None:
    shape = (3, 224, 224)
    with pytest.raises(ConfigError, match=r"12 blocks \(\S+, ...\) follow its last convolution, and \d layers come"):
        cut(build(name, shape), InputSpec(shape=shape))


def run_config(folder: Path, name: str) -> RunConfig:
    return resolve_config(
        flags={
            "model.name": name,
            "storage.uri": str(folder),
            "memory.budget_bytes": "4MiB",
            "memory.max_batch_size": 32,
            "data.max_train_images": 64,
            "data.image_size": 16,
            "train.epochs": 1,
            "train.unit_layers": 9,
            "train.device": "cpu",
            "cluster.executor": "inline",
            "cluster.num_threads": 1,
        }
    )


def test_torchvision_model_trains_in_blocks_and_is_loaded_without_being_named(tmp_path: Path) -> None:
    summary = train(run_config(tmp_path, "torchvision:shufflenet_v2_x0_5"))
    assert len(summary["blocks"]) >= 2
    assert all(block["measured_peak_bytes"] <= block["predicted_peak_bytes"] for block in summary["blocks"])
    model = load_model(f"{tmp_path}/run")
    assert model.card.model == "torchvision:shufflenet_v2_x0_5"
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


# What is left out are transformers, and 645 M weights.
ALL_OF_TORCHVISION = torchvision.models.list_models(
    module=torchvision.models, exclude=["vit_*", "swin_*", "regnet_y_128gf"]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_OF_TORCHVISION)
def test_every_torchvision_classifier_with_convolutions_is_cut(name: str) -> None:
    size = 224 if name == "maxvit_t" else 96
    cut_model = cut(build(f"torchvision:{name}", (3, size, size)), InputSpec(shape=(3, size, size)))
    assert len(cut_model.layers) >= 5
    assert all(len(out_shape) == 3 for out_shape in cut_model.out_shapes)
