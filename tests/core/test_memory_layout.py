"""Layout of activations: large maps channels last, small ones not, numbers always the same."""

import pytest
import torch

from nf_pipeline.core.layers import cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.samples import InputSpec, TargetSpec


@pytest.mark.parametrize(("side", "is_last"), [(32, True), (16, True), (15, False), (4, False)])
def test_large_maps_lie_channels_last_and_small_ones_do_not(side: int, is_last: bool) -> None:
    for x_NCHW in (torch.randn(2, 8, side, side), torch.randn(2, side, side, 8).permute(0, 3, 1, 2)):
        result = laid_out(x_NCHW)
        assert torch.equal(result, x_NCHW)
        assert result.is_contiguous(memory_format=torch.channels_last) == is_last
        assert result.is_contiguous() != is_last


def test_what_lies_right_is_not_copied() -> None:
    x_NCHW = torch.randn(2, 8, 4, 4)
    assert laid_out(x_NCHW) is x_NCHW


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 16), (5, 1)])
def test_maps_that_lie_both_ways_get_the_strides_of_their_size(channels: int, side: int) -> None:
    ways = (torch.randn(2, channels, side, side), torch.randn(2, side, side, channels).permute(0, 3, 1, 2))
    results = [laid_out(x_NCHW) for x_NCHW in ways]
    assert results[0].stride() == results[1].stride()
    assert all(torch.equal(result, x_NCHW) for result, x_NCHW in zip(results, ways, strict=True))


def test_map_that_a_larger_one_is_made_of_lies_as_that_one() -> None:
    x_NCHW = torch.randn(2, 8, 4, 4)
    assert torch.equal(laid_out(x_NCHW, 256), x_NCHW)
    assert laid_out(x_NCHW, 256).is_contiguous(memory_format=torch.channels_last)
    assert laid_out(x_NCHW, 255) is x_NCHW


def test_vectors_stay_as_they_are() -> None:
    x_NF = torch.randn(2, 8)
    assert laid_out(x_NF) is x_NF


def test_units_compute_what_the_model_does_whatever_the_layout() -> None:
    model = build_model("vgg11_bn", inputs=InputSpec(shape=(3, 32, 32)), num_outputs=10, seed=0).eval()
    x_NCHW = images_NCHW = torch.randn(2, 3, 32, 32)
    for unit in build_units(
        cut(model, InputSpec(shape=(3, 32, 32))), "adaptive", even_spans(8, 3), TargetSpec(size=10), 0
    ):
        x_NCHW, logits_NK = unit.eval()(x_NCHW)
    torch.testing.assert_close(logits_NK, model(images_NCHW))
