"""The benchmark's own network."""

from nf_pipeline.bench.networks import narrow_vgg16
from nf_pipeline.core.layers import cut


def test_narrow_vgg16_has_13_layers_and_a_sixteenth_of_the_weights():
    model = narrow_vgg16(num_classes=10, image_shape=(3, 32, 32))
    assert len(cut(model, (3, 32, 32)).layers) == 13
    assert 0.9e6 < sum(weight.numel() for weight in model.parameters()) < 0.95e6
