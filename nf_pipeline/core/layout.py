"""How activations lie in memory: what a CPU computes fastest with.

oneDNN convolves large maps faster when the channels of a pixel lie together, and so do batch norm and pooling; small
maps the other way round. Measured on single layers of VGG-11 with batches of 8 and 64, one core: training takes 0.61
to 0.63 of the time at 32x32 pixels, 0.77 at 16x16, 0.94 to 1.2 at 8x8, 1.35 to 1.5 at 4x4
(`workflows/benchmarks/inner_step.py`). Weights stay as they are: converting them brings nothing more. [ours]

Entry function: `laid_out`.
"""

import torch

CHANNELS_LAST_PIXELS = 256


def laid_out(x_NCHW: torch.Tensor, num_pixels: int | None = None) -> torch.Tensor:
    """Returns the same numbers in the layout that suits the next layer; a copy only where it is another one.

    Tensors on a GPU, and what are no maps, stay as they are.

    Args:
        x_NCHW: of any shape.
        num_pixels: of the map that counts where another one is made of this one at once; left out, its own.
    """
    if x_NCHW.device.type != "cpu" or x_NCHW.dim() != 4:
        return x_NCHW
    channels, height, width = x_NCHW.shape[1:]
    is_large = (num_pixels or height * width) >= CHANNELS_LAST_PIXELS
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last if is_large else torch.contiguous_format)
    if channels > 1 and height * width > 1:
        return x_NCHW
    # One channel, or one pixel, lies both ways: the strides say which one the next layer goes on with.
    strides = (1, width * channels, channels) if is_large else (height * width, width, 1)
    return x_NCHW.as_strided(x_NCHW.shape, (x_NCHW[0].numel(), *strides))
