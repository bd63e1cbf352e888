"""Guesses of samples from what layers return: any number of sides on both ends."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.core.reconstruction import WIDTH, Decoder, squared_error

OUT_SHAPES = [(6, 5, 5), (6, 9), (6, 3, 4, 5), (7,), (6, 1, 1)]
SAMPLE_SHAPES = [(3, 16, 16), (1, 7, 5), (2, 40), (1, 6, 6, 6), (5,)]


@pytest.mark.parametrize(("out_shape", "sample_shape"), [*itertools.product(OUT_SHAPES, SAMPLE_SHAPES)])
def test_guess_has_the_samples_shape_and_sends_gradients_to_the_layers(
    out_shape: tuple[int, ...], sample_shape: tuple[int, ...]
) -> None:
    decoder, out = Decoder(out_shape, sample_shape), torch.randn(4, *out_shape, requires_grad=True)
    guess = decoder(out)
    assert guess.shape == (4, *sample_shape) and guess.dtype == torch.float32
    squared_error(guess, torch.randn(4, *sample_shape)).backward()
    assert out.grad.abs().sum() > 0
    assert all(weight.grad is not None for weight in decoder.parameters())


def test_map_is_narrowed_where_it_is_and_brought_to_the_samples_size_then() -> None:
    decoder, seen = Decoder((40, 4, 4), (3, 32, 32)), []
    for part in decoder.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
    decoder(torch.randn(2, 40, 4, 4))
    assert seen == [(40, 4, 4), (WIDTH, 32, 32)]


def test_guess_is_two_convolutions_with_an_interpolation_between_them() -> None:
    decoder, out_NCHW = Decoder((6, 4, 4), (3, 16, 16)), torch.randn(5, 6, 4, 4)
    first, last = (part for part in decoder.modules() if isinstance(part, nn.Conv2d))
    narrow = functional.relu(
        functional.batch_norm(functional.conv2d(out_NCHW, first.weight, padding=1), None, None, training=True)
    )
    large = functional.interpolate(narrow, size=(16, 16), mode="bilinear")
    expected = functional.conv2d(large, last.weight, last.bias, padding=1)
    torch.testing.assert_close(decoder(out_NCHW), expected)


def test_map_of_the_samples_size_is_not_interpolated() -> None:
    decoder = Decoder((6, 8, 8), (1, 8, 8))
    assert not [part for part in decoder.modules() if isinstance(part, nn.Upsample)]


def test_error_of_who_guesses_the_mean_of_standardised_samples_is_one() -> None:
    sample = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = (sample - sample.mean()) / sample.std(correction=0)
    assert squared_error(torch.zeros_like(sample), sample).item() == pytest.approx(1.0)


def test_error_and_guess_under_bf16_are_off_by_the_layers_rounding_alone() -> None:
    decoder, out_NCHW, sample = Decoder((6, 4, 4), (1, 8, 8)), torch.randn(5, 6, 4, 4), torch.randn(5, 1, 8, 8)
    exact = squared_error(decoder(out_NCHW), sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = decoder(out_NCHW)
        low = squared_error(guess, sample)
    assert guess.dtype == low.dtype == torch.float32
    assert torch.equal(low, squared_error(guess, sample))
    assert low.item() == pytest.approx(exact.item(), rel=0.01)


def test_decoder_learns_to_make_a_blurred_sample_again() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(32, 1, 4, 4, generator=generator)
    sample = functional.interpolate(coarse, size=(12, 12), mode="bilinear")
    out = torch.cat([coarse, -coarse, torch.randn(32, 4, 4, 4, generator=generator)], dim=1)
    torch.manual_seed(0)
    decoder = Decoder((6, 4, 4), (1, 12, 12))
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        error = squared_error(decoder(out), sample)
        error.backward()
        optimizer.step()
    assert error.item() < 0.1 * sample.square().mean().item()
