"""How fast the final model classifies, beside the full network. Entry: `compare_inference`."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

_BATCHES = (128, 1)
_ROUNDS = 7
_ROUND_S = 0.15


def compare_inference(
    models: Mapping[str, nn.Module], image_shape: Sequence[int], device: torch.device
) -> dict[str, dict[str, float]]:
    """Measures models in turns, so that a busy machine is busy for all of them.

    Args:
        models: by name; each maps pixels_NCHW to logits_NK.
        image_shape: (C, H, W).

    Returns:
        "batch 128" and "batch 1" -> name -> median images per second.
    """
    placed = {name: model.eval().to(device) for name, model in models.items()}
    return {f"batch {size}": _rates(placed, size, image_shape, device) for size in _BATCHES}


@torch.no_grad()
def _rates(
    models: Mapping[str, nn.Module], size: int, image_shape: Sequence[int], device: torch.device
) -> dict[str, float]:
    pixels_NCHW = torch.randint(0, 256, (size, *image_shape), dtype=torch.uint8, device=device)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(pixels_NCHW)  # the first call chooses kernels
    for _ in range(_ROUNDS):
        for name, model in models.items():
            rates[name].append(_rate(model, pixels_NCHW))
    return {name: statistics.median(values) for name, values in rates.items()}


def _rate(model: nn.Module, pixels_NCHW: torch.Tensor) -> float:
    began, num_images = time.perf_counter(), 0
    while time.perf_counter() - began < _ROUND_S:
        model(pixels_NCHW)
        num_images += len(pixels_NCHW)
        if pixels_NCHW.is_cuda:
            torch.cuda.synchronize(pixels_NCHW.device)
    return num_images / (time.perf_counter() - began)
