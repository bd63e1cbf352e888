"""Random changes of stored images, the same for a sample and a view whatever batch it comes in.

Works on uint8 batches in host memory, before they are normalised and moved to the device. Every number is drawn by
hashing (seed, view, sample id), so that any number of workers and any order of samples gives the same images.
Entry: `augment_images`.
"""

import numpy as np
import torch
from torch.nn import functional

MAX_SHIFT_PART = 8
"""Images are shifted by at most an eighth of their size: 4 pixels of 32, as usual for CIFAR."""


def augment_images(x_NCHW: torch.Tensor, sample_ids: np.ndarray, *, kind: str, seed: int, view: int) -> torch.Tensor:
    """Flips images left to right and shifts them, the border filled with zeros.

    Args:
        x_NCHW: uint8, on the host.
        sample_ids: int64 [N].
        kind: "flip" or "crop_flip".
        seed: of the run.
        view: another view, other changes: the epoch or the round.

    Returns:
        uint8 of the same shape; the input is left as it is.
    """
    bits_N = _hash(sample_ids, seed, view)
    if kind == "crop_flip":
        x_NCHW = _shift(x_NCHW, bits_N >> np.uint64(8))
    flipped_N = torch.from_numpy((bits_N & np.uint64(1)).astype(bool))
    return torch.where(flipped_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)


def _shift(x_NCHW: torch.Tensor, bits_N: np.ndarray) -> torch.Tensor:
    height, width = x_NCHW.shape[2:]
    pad_h, pad_w = -(-height // MAX_SHIFT_PART), -(-width // MAX_SHIFT_PART)
    top_N = torch.from_numpy((bits_N % np.uint64(2 * pad_h + 1)).astype(np.int64))
    left_N = torch.from_numpy(((bits_N >> np.uint64(20)) % np.uint64(2 * pad_w + 1)).astype(np.int64))
    padded = functional.pad(x_NCHW, (pad_w, pad_w, pad_h, pad_h))
    rows_NH = top_N[:, None] + torch.arange(height)
    columns_NW = left_N[:, None] + torch.arange(width)
    n_N = torch.arange(len(x_NCHW))
    # Indices around the channel axis: the result is [N, H, W, C].
    return padded[n_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)


def _hash(sample_ids: np.ndarray, seed: int, view: int) -> np.ndarray:
    """Mixes the numbers into uint64 [N] (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    state = sample_ids.astype(np.uint64)
    for part in (seed, view):
        state = _mix(state ^ _mix(np.uint64(part) + np.zeros(1, np.uint64)))
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
