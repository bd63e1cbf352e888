"""Medical images: is there a lesion in a 16-bit slice, or in a 3-D volume, of a brain?

    python -m workflows.recipes.images --task slices
    python -m workflows.recipes.images --task volumes

The brain is real, the lesions are made: nibabel ships a magnetic resonance scan of 128 x 96 x 24 voxels, from which
pieces of 24 x 24 (one slice, stored as 16-bit grey PNG) or 8 x 24 x 24 voxels (stored as uint16 tensors) are cut at
random places. Two thirds get a lesion near the middle: a Gaussian blob, 2.5 to 4 voxels wide within the slice and 1
to 2 across, that makes tissue 50 to 90 per cent brighter, or darker. The classes are none, bright and dark. Train
comes from one half of the head, validation and test from two parts of the other half: no piece shares a voxel with
one of another split.
"""

import io
from functools import partial
from importlib import resources

import numpy as np
from PIL import Image
from torch import nn

from workflows.recipes.networks import convolutions
from workflows.recipes.recipe import Recipe, Samples, Splits, majority_class, run_recipes

CLASSES = ("none", "bright", "dark")
SIDE = 24
# Half-open ranges of voxels, across and along the head.
REGIONS = {"train": ((0, 64), (0, 96)), "val": ((64, 128), (0, 48)), "test": ((64, 128), (48, 96))}
SCALE = 30  # the scan has 11 bits, and lesions are brighter


def read_scan() -> np.ndarray:
    """Returns the scan, uint16 [24, 96, 128], scaled to 16 bits."""
    import nibabel

    with resources.as_file(resources.files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        scan_XYZ = np.asanyarray(nibabel.load(path).dataobj)[..., 0]
    return (scan_XYZ.transpose(2, 1, 0) * SCALE).astype(np.uint16)


def add_lesion(piece_DHW: np.ndarray, sign: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the piece with a blob that is brighter (sign 1) or darker (-1) than the tissue around it."""
    widths = np.array([rng.uniform(1, 2), rng.uniform(2.5, 4), rng.uniform(2.5, 4)])
    sizes = np.array(piece_DHW.shape)
    centre = (sizes - 1) / 2 + rng.uniform(-1, 1, 3) * np.minimum(sizes // 4, 8) * (sizes > 1)
    offsets = np.moveaxis(np.indices(piece_DHW.shape), 0, -1) - centre
    blob_DHW = np.exp(-0.5 * ((offsets / widths) ** 2).sum(axis=-1))
    changed_DHW = piece_DHW * (1 + sign * rng.uniform(0.5, 0.9) * blob_DHW)
    return changed_DHW.clip(0, 65535).astype(np.uint16)


def load_pieces(rows: int, seed: int, *, depth: int) -> Splits:
    """Cuts pieces of the given depth, in equal numbers for every class."""
    scan_DHW, rng = read_scan(), np.random.default_rng(seed)
    return {
        name: _cut_split(scan_DHW, REGIONS[name], (depth, count), rng)
        for name, count in {"train": rows, "val": rows // 3, "test": rows // 3}.items()
    }


def _cut_split(
    scan_DHW: np.ndarray, region: tuple[tuple[int, int], ...], amount: tuple[int, int], rng: np.random.Generator
) -> Samples:
    (left, right), (top, bottom) = region
    depth, count = amount
    pieces, labels = [], np.arange(count) % len(CLASSES)
    while len(pieces) < count:
        z, y, x = (rng.integers(*r) for r in ((0, 25 - depth), (top, bottom - SIDE + 1), (left, right - SIDE + 1)))
        piece_DHW = scan_DHW[z : z + depth, y : y + SIDE, x : x + SIDE]
        if np.mean(piece_DHW > 200 * SCALE) < 0.7:  # mostly air
            continue
        sign = (0, 1, -1)[labels[len(pieces)]]
        pieces.append(add_lesion(piece_DHW, sign, rng) if sign else piece_DHW)
    names = np.array(CLASSES)[labels]
    if depth == 1:
        return Samples(inputs=[_encode(piece[0]) for piece in pieces], labels=names)
    return Samples(inputs=np.stack(pieces)[:, None], labels=names)


def _encode(slice_HW: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(slice_HW).save(stream, format="PNG")
    return stream.getvalue()


def convnet(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Builds three 2-D or 3-D convolutions, as the samples are."""
    return convolutions(input_shape, (16, 32, 32), num_outputs)


RECIPES = {
    "slices": Recipe(
        load=partial(load_pieces, depth=1),
        rows=1500,
        model="workflows.recipes.images:convnet",
        budget="1MiB",
        settings={"data.pixels": "uint16", "memory.max_batch_size": 32},
        baseline=majority_class,
    ),
    "volumes": Recipe(
        load=partial(load_pieces, depth=8),
        rows=900,
        model="workflows.recipes.images:convnet",
        budget="4MiB",
        settings={"memory.max_batch_size": 32, "memory.good_batch_size": 16},
        baseline=majority_class,
    ),
}

if __name__ == "__main__":  # worker processes import this file again
    run_recipes(__doc__, RECIPES)
