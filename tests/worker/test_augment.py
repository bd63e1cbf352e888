"""Random changes depend on the sample and the view, never on the batch."""

import numpy as np
import pytest
import torch

from nf_pipeline.worker.augment import augment_images

IDS = np.arange(200)
KINDS = ("flip", "crop_flip")


def images(num: int = 200, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_changed_the_same_way_in_every_batch(kind: str) -> None:
    x_NCHW = images()
    whole = augment_images(x_NCHW, IDS, kind=kind, seed=1, view=2)
    order = np.random.default_rng(0).permutation(200)[:17]
    part = augment_images(x_NCHW[order], IDS[order], kind=kind, seed=1, view=2)
    assert torch.equal(part, whole[order])
    assert whole.dtype == torch.uint8 and whole.shape == x_NCHW.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [{"seed": 2, "view": 2}, {"seed": 1, "view": 3}])
def test_another_seed_or_view_changes_samples_otherwise(kind: str, other: dict[str, int]) -> None:
    first = augment_images(images(), IDS, kind=kind, seed=1, view=2)
    assert not torch.equal(first, augment_images(images(), IDS, kind=kind, **other))


def test_about_half_of_the_samples_are_mirrored_and_the_others_untouched() -> None:
    x_NCHW = images()
    changed = augment_images(x_NCHW, IDS, kind="flip", seed=0, view=0)
    same = (changed == x_NCHW).flatten(1).all(1)
    mirrored = (changed == x_NCHW.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 70 < int(mirrored.sum()) < 130


def test_crops_reach_every_shift_up_to_an_eighth_and_fill_with_zeros() -> None:
    inside = torch.full((2000, 1, 32, 32), 255, dtype=torch.uint8)
    moved = augment_images(inside, np.arange(2000), kind="crop_flip", seed=0, view=0)
    empty_rows = (moved.amax(3) == 0).sum(2)
    assert empty_rows.min() == 0 and empty_rows.max() == 4
    assert len(torch.unique(empty_rows)) == 5


def test_input_is_left_as_it_is() -> None:
    x_NCHW = images()
    augment_images(x_NCHW, IDS, kind="crop_flip", seed=0, view=0)
    assert torch.equal(x_NCHW, images())
