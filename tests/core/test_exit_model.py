"""The final model: built from a spec alone, takes pixels, and loads what another build stored."""

from dataclasses import replace

import pytest
import torch

from nf_pipeline.core.exit_model import ExitSpec, build_exit_model
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

MEAN, STD = (127.5, 63.75, 0.0), (127.5, 127.5, 255.0)
INPUTS = InputSpec(shape=(3, 16, 16), mean=MEAN, std=STD)
SPEC = ExitSpec(model="convnet", inputs=INPUTS, target=TargetSpec(size=7), head="adaptive", num_layers=4)


def test_exit_model_of_some_units_takes_raw_pixels_in_inference_mode() -> None:
    model = build_exit_model(SPEC)
    assert not model.training
    assert len(model.layers) == 4
    pixels_NCHW = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert model(pixels_NCHW).shape == (5, 7)
    expected_NCHW = (pixels_NCHW - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(model.normalise(pixels_NCHW), expected_NCHW)


def test_exit_model_of_another_build_takes_its_weights() -> None:
    trained, fresh = (build_exit_model(SPEC) for _ in range(2))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    fresh.load_state_dict(trained.state_dict())
    pixels_NCHW = torch.full((2, 3, 16, 16), 200.0)
    assert torch.equal(fresh(pixels_NCHW), trained(pixels_NCHW))


def test_exit_at_the_last_layer_has_the_models_own_classifier() -> None:
    whole = build_exit_model(replace(SPEC, num_layers=6))
    assert [name for name, _ in whole.head.named_children()] != ["conv", "bn", "relu", "pool", "flatten", "linear"]
    assert len(whole.layers) == 6


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 7, convnet has 6 layers"):
        build_exit_model(replace(SPEC, num_layers=7))
