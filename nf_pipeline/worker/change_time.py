"""Measures what the random changes of a run's images take, by changing some of noise.

Where blocks start from the images they are changed again in every epoch, which a plan weighs against reading what a
block has stored. Entry: `measure_changes`.
"""

import math
import time

import numpy as np
import torch

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.samples import InputSpec
from nf_pipeline.worker.augment import augment_images

BATCH_SIZE = 32
REPEATS = 3


def measure_changes(train: TrainConfig, inputs: InputSpec) -> float:
    """Returns the seconds that one image takes one thread; 0 where images stay as they are, or nothing is timed.

    The shortest of some runs, after a first one, which imports what it needs.

    Args:
        train: which changes, of pictures alone; where the user fixed the units, nothing is timed.
        inputs: what is changed.
    """
    if train.augment == "none" or train.unit_layers is not None or not inputs.is_image:
        return 0.0
    num_bytes = math.prod(inputs.shape) * ITEM_BYTES[inputs.dtype]
    noise = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, num_bytes), np.uint8)
    images_NCHW = torch.from_numpy(noise).view(TORCH_DTYPES[inputs.dtype]).view(BATCH_SIZE, *inputs.shape)
    return min([_seconds(train, images_NCHW, view) for view in range(REPEATS + 1)][1:]) / BATCH_SIZE


def _seconds(train: TrainConfig, images_NCHW: torch.Tensor, view: int) -> float:
    began = time.process_time()
    augment_images(images_NCHW, np.arange(len(images_NCHW)), kind=train.augment, seed=train.seed, view=view)
    return time.process_time() - began
