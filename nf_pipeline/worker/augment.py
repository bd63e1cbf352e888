"""Random changes of stored samples, the same for a sample and a view whatever batch it comes in.

Works on batches in host memory, before they are normalised and moved to the device: on images, or on stored
activation maps, of any type. What cannot be changed so is refused when a run is planned
(`nf_pipeline.core.sample_changes`). A map that is flipped or shifted is about what the trained layers would make of a
flipped or shifted image, not exactly: their filters are not symmetric, and pools and borders do not move along.
Entries: `augment_images`, `augment_maps`.
"""

import numpy as np
import torch
from torch.nn import functional

from nf_pipeline.core.sample_changes import COLOR_KINDS
from nf_pipeline.worker.image_changes import jitter_colors, rand_augment
from nf_pipeline.worker.sample_bits import hash_samples

MAX_SHIFT_PART = 8
"""Images are shifted by at most an eighth of their size: 4 pixels of 32, as usual for CIFAR."""

_COLOR_KINDS = dict(zip(COLOR_KINDS, (jitter_colors, rand_augment), strict=True))


def augment_images(x_NCHW: torch.Tensor, sample_ids: np.ndarray, *, kind: str, seed: int, view: int) -> torch.Tensor:
    """Flips images left to right, shifts them, the border filled with zeros, and changes their colours.

    Args:
        x_NCHW: of any type, on the host; uint8 with 1 or 3 channels where colours are changed.
        sample_ids: int64 [N].
        kind: "flip", "crop_flip" (also shifted), "color" or "randaugment" (also shifted, and then changed by that).
        seed: of the run.
        view: another view, other changes: the epoch, the round or the stored view.

    Returns:
        The same type and shape; the input is left as it is.
    """
    bits_N = hash_samples(sample_ids, seed, view)
    if x_NCHW.dtype == torch.uint16:
        # torch moves such numbers about in few of its operations: another type of as many bytes does as well.
        return _moved(x_NCHW.view(torch.int16), bits_N, kind).view(torch.uint16)
    return _moved(x_NCHW, bits_N, kind)


def _moved(x_NCHW: torch.Tensor, bits_N: np.ndarray, kind: str) -> torch.Tensor:
    if kind != "flip":
        x_NCHW = _shift(x_NCHW, bits_N >> np.uint64(8))
    x_NCHW = _flip(x_NCHW, bits_N)
    return _COLOR_KINDS[kind](x_NCHW, bits_N) if kind in _COLOR_KINDS else x_NCHW


def augment_maps(
    x_NCHW: torch.Tensor, sample_ids: np.ndarray, *, kind: str, seed: int, epoch: int, block_idx: int
) -> torch.Tensor:
    """Flips activation maps left to right and shifts them by whole cells, the border filled with what is next to it.

    Args:
        x_NCHW: of any type, on the host.
        sample_ids: int64 [N].
        kind: "flip", or "flip_shift": also shifted by up to an eighth of a side, rounded down.
        seed: of the run.
        epoch: another epoch, other changes.
        block_idx: the block that reads the maps; another block, other changes.

    Returns:
        The same type and shape; the input is left as it is.
    """
    bits_N = hash_samples(sample_ids, seed, epoch, block_idx)
    if kind == "flip_shift":
        x_NCHW = _shift_cells(x_NCHW, bits_N >> np.uint64(8))
    return _flip(x_NCHW, bits_N)


def _flip(x_NCHW: torch.Tensor, bits_N: np.ndarray) -> torch.Tensor:
    flipped_N = torch.from_numpy((bits_N & np.uint64(1)).astype(bool))
    return torch.where(flipped_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)


def _shift(x_NCHW: torch.Tensor, bits_N: np.ndarray) -> torch.Tensor:
    height, width = x_NCHW.shape[2:]
    pad_h, pad_w = -(-height // MAX_SHIFT_PART), -(-width // MAX_SHIFT_PART)
    top_N, left_N = _offsets(bits_N, 2 * pad_h + 1), _offsets(bits_N >> np.uint64(20), 2 * pad_w + 1)
    padded = functional.pad(x_NCHW, (pad_w, pad_w, pad_h, pad_h))
    return _cells(padded, top_N[:, None] + torch.arange(height), left_N[:, None] + torch.arange(width))


def _shift_cells(x_NCHW: torch.Tensor, bits_N: np.ndarray) -> torch.Tensor:
    height, width = x_NCHW.shape[2:]
    most_h, most_w = height // MAX_SHIFT_PART, width // MAX_SHIFT_PART
    down_N = _offsets(bits_N, 2 * most_h + 1) - most_h
    right_N = _offsets(bits_N >> np.uint64(20), 2 * most_w + 1) - most_w
    rows_NH = (down_N[:, None] + torch.arange(height)).clamp_(0, height - 1)
    columns_NW = (right_N[:, None] + torch.arange(width)).clamp_(0, width - 1)
    return _cells(x_NCHW, rows_NH, columns_NW)


def _offsets(bits_N: np.ndarray, count: int) -> torch.Tensor:
    return torch.from_numpy((bits_N % np.uint64(count)).astype(np.int64))


def _cells(x_NCHW: torch.Tensor, rows_NH: torch.Tensor, columns_NW: torch.Tensor) -> torch.Tensor:
    n_N = torch.arange(len(x_NCHW))
    # Indices around the channel axis: the result is [N, H, W, C].
    return x_NCHW[n_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)
