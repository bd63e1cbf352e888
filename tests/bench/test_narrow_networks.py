"""The benchmark's own networks."""

import pytest
from torch import nn

from nf_pipeline.bench.networks import narrow_resnet18, narrow_vgg16
from nf_pipeline.core.layers import cut
from nf_pipeline.samples import InputSpec

SHAPE = (3, 32, 32)


@pytest.mark.parametrize(
    ("model", "num_layers", "millions"),
    [(narrow_vgg16(10, SHAPE), 13, (0.9, 0.95)), (narrow_resnet18(10, SHAPE), 9, (0.65, 0.75))],
    ids=["vgg16", "resnet18"],
)
def test_narrow_network_is_cut_at_every_block_and_has_a_sixteenth_of_the_weights(
    model: nn.Module, num_layers: int, millions: tuple[float, float]
) -> None:
    assert len(cut(model, InputSpec(shape=SHAPE)).layers) == num_layers
    assert millions[0] < sum(weight.numel() for weight in model.parameters()) / 1e6 < millions[1]
