"""Similarities of samples: the formula written out, for maps of any number of sides."""

import math

import pytest
import torch
from torch.nn import functional

from nf_pipeline.core.similarity import LARGEST_MAP_PIXELS, SMALLEST_NORM, Similarities, similarities


def cosine(one: list[float], other: list[float]) -> float:
    """Of two vectors, each centred at its own mean."""
    a, b = ([value - sum(vector) / len(vector) for value in vector] for vector in (one, other))
    scale = math.sqrt(sum(value**2 for value in a) * sum(value**2 for value in b))
    return sum(left * right for left, right in zip(a, b, strict=True)) / scale


def test_similarities_are_cosines_of_centred_samples() -> None:
    x_NF = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [[cosine(one, other) for other in x_NF.tolist()] for one in x_NF.tolist()]
    torch.testing.assert_close(similarities(x_NF), torch.tensor(expected, dtype=torch.float64))


def test_similarities_under_bf16_are_those_of_float32() -> None:
    x_NF = 3.0 + torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    one_hot_NK = functional.one_hot(torch.arange(8) % 3, 3).float()
    for samples in (x_NF, one_hot_NK):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low_NN = similarities(samples)
        assert torch.equal(low_NN, similarities(samples))


def test_gradient_of_a_nearly_dead_sample_is_bounded() -> None:
    x_NF = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scales_N1 = torch.tensor([1e-9, 1.0, 1.0, 1.0, 1.0])[:, None]
    dead_NF = (scales_N1 * x_NF).requires_grad_()
    weights_NN = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    cosines_NN = similarities(dead_NF)
    (cosines_NN * weights_NN).sum().backward()
    first, *others = dead_NF.grad.norm(dim=1).tolist()
    assert first < 10 / SMALLEST_NORM * max(others)
    torch.testing.assert_close(cosines_NN[1:, 1:], similarities(x_NF)[1:, 1:])


@pytest.mark.parametrize(
    ("out_shape", "pixels"),
    [
        *[((8, 16, 16), 256), ((8, 32, 32), 256), ((8, 7, 40), 80), ((2, 224, 224), 196), ((8, 1, 1), 1)],
        *[((3, 2, 2), 4), ((8, 300), 150), ((8, 40), 40), ((4, 1), 1), ((8, 9, 9, 9), 125), ((4, 4, 4, 4), 64)],
    ],
)
def test_large_maps_are_pooled_first_and_small_ones_kept(out_shape: tuple[int, ...], pixels: int) -> None:
    module, seen = Similarities(out_shape), []
    module.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0].numel()))
    matrix_NN = module(torch.randn(3, *out_shape))
    assert (seen, matrix_NN.shape) == ([pixels], (3, 3))
    assert pixels <= LARGEST_MAP_PIXELS
    torch.testing.assert_close(matrix_NN.diagonal(), torch.ones(3))


def test_vectors_are_compared_as_they_are() -> None:
    x_NF = torch.randn(4, 9)
    assert torch.equal(Similarities((9,))(x_NF), similarities(x_NF))


@pytest.mark.parametrize("out_shape", [(6, 9), (6, 3, 4, 5)])
def test_maps_with_one_and_three_sides_are_matched_by_their_channels_spreads(out_shape: tuple[int, ...]) -> None:
    module = Similarities(out_shape)
    out = torch.randn(9, *out_shape, generator=torch.Generator().manual_seed(3))
    conv = {1: functional.conv1d, 3: functional.conv3d}[len(out_shape) - 1]
    spreads_NC = conv(out, module.conv.weight, padding=1).flatten(2).std(dim=2)
    torch.testing.assert_close(module(out), similarities(spreads_NC))
    assert module.conv.weight.shape == (6, 6, *[3] * (len(out_shape) - 1))
