"""Random colours and RandAugment: torchvision's results, with numbers that belong to the sample."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from nf_pipeline.worker.image_changes import jitter_colors, rand_augment
from nf_pipeline.worker.sample_bits import hash_samples, uniform

BITS = hash_samples(np.arange(300), 0, 1)


def images(num: int = 300, channels: int = 3, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, side, side), dtype=torch.uint8, generator=generator)


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    draws = np.stack([uniform(hash_samples(np.arange(4000), 7, 3), draw) for draw in range(4)])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.06


def test_operations_are_those_of_torchvision_and_all_occur() -> None:
    image = images(1)
    reference, transform = set(), v2.RandAugment(num_ops=1)
    with torch.random.fork_rng():
        for seed in range(400):
            torch.manual_seed(seed)
            reference.add(transform(image[0]).numpy().tobytes())
    ours = rand_augment(image.expand(300, -1, -1, -1), BITS, num_operations=1)
    assert {changed.numpy().tobytes() for changed in ours} == reference
    assert len(reference) > 15


def test_colours_are_those_of_torchvision_for_the_drawn_numbers() -> None:
    image, bits_N = images(1), BITS[:1]
    factors = [1 + 0.4 * (2 * float(uniform(bits_N, draw)[0]) - 1) for draw in range(3)]
    wanted = v2.functional.adjust_brightness(image[0], factors[0])
    wanted = v2.functional.adjust_contrast(wanted, factors[1])
    wanted = v2.functional.adjust_saturation(wanted, factors[2])
    assert torch.equal(jitter_colors(image, bits_N)[0], wanted)


@pytest.mark.parametrize("change", [jitter_colors, rand_augment])
@pytest.mark.parametrize("channels", [1, 3])
def test_result_depends_on_the_sample_alone_and_moves_no_generator(change, channels: int) -> None:
    x_NCHW, state = images(channels=channels), torch.get_rng_state()
    whole = change(x_NCHW, BITS)
    assert whole.dtype == torch.uint8 and whole.shape == x_NCHW.shape
    assert (whole != x_NCHW).flatten(1).any(1).float().mean() > 0.5
    order = np.random.default_rng(0).permutation(300)
    strided = x_NCHW.contiguous(memory_format=torch.channels_last)
    with ThreadPoolExecutor(2) as pool:  # as the threads that gather
        parts = list(pool.map(lambda rows: change(strided[rows], BITS[rows]), np.array_split(order, 7)))
    assert torch.equal(torch.cat(parts), whole[order])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x_NCHW, images(channels=channels)), "the input is left as it is"
