"""Random changes depend on the sample and the view, never on the batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nf_pipeline.worker.augment import augment_images, augment_maps
from nf_pipeline.worker.image_changes import jitter_colors, rand_augment
from nf_pipeline.worker.sample_bits import hash_samples

IDS = np.arange(200)
KINDS = ("flip", "crop_flip", "color", "randaugment")
MAP_KINDS = ("flip", "flip_shift")


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


@pytest.mark.parametrize(("kind", "change"), [("color", jitter_colors), ("randaugment", rand_augment)])
def test_colours_come_on_top_of_crops_and_flips(kind: str, change: Callable[..., torch.Tensor]) -> None:
    cropped = augment_images(images(), IDS, kind="crop_flip", seed=1, view=2)
    changed = augment_images(images(), IDS, kind=kind, seed=1, view=2)
    assert torch.equal(changed, change(cropped, hash_samples(IDS, 1, 2)))
    assert not torch.equal(changed, cropped)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float32])
@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_images_of_other_types_are_moved_like_bytes(kind: str, dtype: torch.dtype) -> None:
    bytes_NCHW = images()
    other_NCHW = bytes_NCHW.to(dtype)
    changed = augment_images(other_NCHW, IDS, kind=kind, seed=1, view=2)
    assert changed.dtype == dtype
    assert torch.equal(changed.float(), augment_images(bytes_NCHW, IDS, kind=kind, seed=1, view=2).float())
    assert torch.equal(other_NCHW.float(), bytes_NCHW.float())


def maps(num: int = 200, side: int = 16, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.arange(num * 2 * side * side).view(num, 2, side, side).remainder(251).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("kind", MAP_KINDS)
def test_map_is_changed_the_same_way_in_every_batch_and_otherwise_elsewhere(kind: str, dtype: torch.dtype) -> None:
    x_NCHW, place = maps(dtype=dtype), {"seed": 1, "epoch": 2, "block_idx": 3}
    whole = augment_maps(x_NCHW, IDS, kind=kind, **place)
    order = np.random.default_rng(0).permutation(200)[:17]
    assert torch.equal(augment_maps(x_NCHW[order], IDS[order], kind=kind, **place), whole[order])
    assert whole.dtype == dtype and torch.equal(x_NCHW, maps(dtype=dtype))
    for other in ({"seed": 2}, {"epoch": 3}, {"block_idx": 4}):
        assert not torch.equal(augment_maps(x_NCHW, IDS, kind=kind, **{**place, **other}), whole)


def test_maps_move_by_up_to_an_eighth_and_repeat_their_border() -> None:
    ramp = torch.arange(16.0).expand(400, 1, 16, 16).contiguous()
    ids = np.arange(400)
    moved = augment_maps(ramp, ids, kind="flip_shift", seed=0, epoch=0, block_idx=1)
    flipped = moved[:, 0, 0, 0] > moved[:, 0, 0, -1]
    straight = torch.where(flipped[:, None, None, None], moved.flip(3), moved)
    shifts = straight[:, 0, 0, 8] - 8
    assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
    assert 140 < int(flipped.sum()) < 260
    wanted = (ramp + shifts[:, None, None, None]).clamp(0, 15)
    assert torch.equal(straight, wanted)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_maps_too_small_to_move_by_an_eighth_are_only_flipped(side: int) -> None:
    x_NCHW, place = maps(side=side), {"seed": 1, "epoch": 2, "block_idx": 3}
    moved = augment_maps(x_NCHW, IDS, kind="flip_shift", **place)
    assert torch.equal(moved, augment_maps(x_NCHW, IDS, kind="flip", **place))
