"""Random colours and RandAugment, by torchvision's kernels: one image at a time, with numbers drawn from its bits.

torchvision's own transforms draw from torch's global generator. Threads that make batches share it with the one that
trains, so results would depend on timing; here the parameters come from `sample_bits`. Images are changed one by one,
as kernels may round otherwise in another batch: some thousands a second and thread. Grey images have no saturation.
Entries: `jitter_colors`, `rand_augment`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from nf_pipeline.worker.sample_bits import uniform

FACTOR_SPREAD = 0.4
"""Brightness, contrast and saturation are multiplied by 0.6 to 1.4, as timm does by default; the hue, which takes
five times as long, stays [ours]."""
NUM_OPERATIONS = 2
MAGNITUDE, NUM_MAGNITUDES = 9, 31
"""Of RandAugment: with `NUM_OPERATIONS` torchvision's defaults."""

Change = Callable[[torch.Tensor, float], torch.Tensor]
"""(image [C, H, W], number) -> the changed image."""


def jitter_colors(x_NCHW: torch.Tensor, bits_N: np.ndarray) -> torch.Tensor:
    """Changes brightness, contrast and saturation of every image, in this order.

    Args:
        x_NCHW: uint8 on the host, C of 1 or 3.
        bits_N: uint64, every image's own.
    """
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    draws_N3 = np.stack([uniform(bits_N, draw) for draw in range(len(changes))], axis=1)
    factors_N3 = 1 + FACTOR_SPREAD * (2 * draws_N3 - 1)
    return _changed(x_NCHW, [list(zip(changes, factors, strict=True)) for factors in factors_N3.tolist()])


def rand_augment(x_NCHW: torch.Tensor, bits_N: np.ndarray, num_operations: int = NUM_OPERATIONS) -> torch.Tensor:
    """Applies random operations of a fixed strength to every image (RandAugment, https://arxiv.org/abs/1909.13719).

    Args:
        x_NCHW: uint8 on the host, C of 1 or 3.
        bits_N: uint64, every image's own.
        num_operations: one after the other, with repetition.
    """
    operations = _operations(*x_NCHW.shape[2:])
    draws = range(num_operations)
    chosen_NK = np.stack([uniform(bits_N, 2 * draw) * len(operations) for draw in draws], axis=1).astype(int)
    signs_NK = np.stack([np.where(uniform(bits_N, 2 * draw + 1) < 0.5, -1.0, 1.0) for draw in draws], axis=1)
    rows = zip(chosen_NK.tolist(), signs_NK.tolist(), strict=True)
    return _changed(x_NCHW, [[(operations[idx], sign) for idx, sign in zip(*row, strict=True)] for row in rows])


def _changed(x_NCHW: torch.Tensor, changes: Sequence[Sequence[tuple[Change, float]]]) -> torch.Tensor:
    changed_NCHW = torch.empty(x_NCHW.shape, dtype=x_NCHW.dtype)
    # Contiguous: kernels may round otherwise with strides that depend on the batch.
    for image, ours, out in zip(x_NCHW.contiguous(), changes, changed_NCHW, strict=True):
        for change, number in ours:
            image = change(image, number)
        out.copy_(image)
    return changed_NCHW


def _operations(height: int, width: int) -> list[Change]:
    """Returns torchvision's 14 operations; the number is the sign, which some leave out of account."""
    from torchvision.transforms.v2 import functional

    move: Callable[..., Any] = partial(functional.affine, angle=0.0, scale=1.0)
    still: Callable[..., Any] = partial(move, translate=[0, 0], center=[0, 0])
    slant = math.degrees(math.atan(_magnitude(0.0, 0.3)))
    right, down = (int(_magnitude(0.0, 150.0 / 331.0 * side)) for side in (width, height))
    angle, spread = _magnitude(0.0, 30.0), _magnitude(0.0, 0.9)
    num_bits, threshold = round(_magnitude(8.0, 4.0)), 255 * _magnitude(1.0, 0.0)
    return [
        lambda image, sign: image,
        lambda image, sign: still(image, shear=[sign * slant, 0.0]),
        lambda image, sign: still(image, shear=[0.0, sign * slant]),
        lambda image, sign: move(image, translate=[int(sign) * right, 0], shear=[0.0, 0.0]),
        lambda image, sign: move(image, translate=[0, int(sign) * down], shear=[0.0, 0.0]),
        lambda image, sign: functional.rotate(image, angle=sign * angle),
        lambda image, sign: functional.adjust_brightness(image, 1 + sign * spread),
        lambda image, sign: functional.adjust_saturation(image, 1 + sign * spread),
        lambda image, sign: functional.adjust_contrast(image, 1 + sign * spread),
        lambda image, sign: functional.adjust_sharpness(image, 1 + sign * spread),
        lambda image, sign: functional.posterize(image, bits=num_bits),
        lambda image, sign: functional.solarize(image, threshold=threshold),
        lambda image, sign: functional.autocontrast(image),
        lambda image, sign: functional.equalize(image),
    ]


def _magnitude(smallest: float, largest: float) -> float:
    """Returns the number that torchvision takes, to the last bit."""
    return float(torch.linspace(smallest, largest, NUM_MAGNITUDES)[MAGNITUDE])
