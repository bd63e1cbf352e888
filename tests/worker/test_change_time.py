"""What the random changes of images are said to take."""

import pytest

from nf_pipeline.config import TrainConfig
from nf_pipeline.samples import InputSpec
from nf_pipeline.worker.change_time import measure_changes

PICTURES = InputSpec(shape=(3, 32, 32))


def test_many_operations_on_a_large_picture_take_longer_than_a_flip_of_a_small_one() -> None:
    small = measure_changes(TrainConfig(augment="flip"), PICTURES)
    large = measure_changes(TrainConfig(augment="randaugment"), InputSpec(shape=(3, 96, 96)))
    assert 0.0 < small < large < 1.0


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pictures_of_every_type_are_changed(dtype: str) -> None:
    grey = InputSpec(shape=(1, 16, 16), dtype=dtype)
    assert measure_changes(TrainConfig(augment="crop_flip"), grey) > 0.0


@pytest.mark.parametrize(
    ("train", "inputs"),
    [
        (TrainConfig(), PICTURES),
        (TrainConfig(augment="flip", unit_layers=1), PICTURES),
        (TrainConfig(augment="flip"), InputSpec(shape=(3, 32))),
    ],
)
def test_nothing_is_measured_where_nothing_is_changed_or_timed(train: TrainConfig, inputs: InputSpec) -> None:
    assert measure_changes(train, inputs) == 0.0
