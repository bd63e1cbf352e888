"""The final model: built from a spec alone, takes pixels, and loads what another build stored."""

import pytest
import torch

from nf_pipeline.core.exit_model import ExitSpec, build_exit_model, build_first_units

SPEC = ExitSpec(model="convnet", image_shape=(3, 16, 16), num_classes=7, head="adaptive", unit_layers=2, num_units=2)
MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.5, 1.0)


def test_exit_model_of_some_units_takes_raw_pixels_in_inference_mode() -> None:
    model = build_exit_model(SPEC, mean=MEAN, std=STD)
    assert not model.training
    assert len(model.layers) == 4
    pixels_NCHW = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert model(pixels_NCHW).shape == (5, 7)
    expected_NCHW = (pixels_NCHW / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(model.normalise(pixels_NCHW), expected_NCHW)


def test_exit_model_of_another_build_takes_its_weights() -> None:
    trained, fresh = (build_exit_model(SPEC, mean=MEAN, std=STD) for _ in range(2))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    fresh.load_state_dict(trained.state_dict())
    pixels_NCHW = torch.full((2, 3, 16, 16), 200.0)
    assert torch.equal(fresh(pixels_NCHW), trained(pixels_NCHW))


@pytest.mark.parametrize(("num_units", "expected"), [(1, 1), (3, 3), (99, 3)])
def test_no_more_units_are_built_than_the_model_has(num_units: int, expected: int) -> None:
    spec = ExitSpec(
        model="convnet",
        image_shape=(3, 16, 16),
        num_classes=7,
        head="adaptive",
        unit_layers=2,
        num_units=num_units,
    )
    assert len(build_first_units(spec)) == expected


def test_first_units_have_seeded_weights() -> None:
    first, again, other = (build_first_units(SPEC, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
