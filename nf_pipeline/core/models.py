"""Builds networks by name: the registry's, those of torchvision and timm, or the user's own `package.module:factory`.

Knows nothing of layers or training. Entry: `build_model`.
"""

import torch
from torch import nn

from nf_pipeline.core.factory_models import build_by_factory
from nf_pipeline.core.library_models import build_from_library
from nf_pipeline.core.registry import build_registered
from nf_pipeline.trust import is_factory


def build_model(name: str, *, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Builds a network with float32 weights on the CPU; the same seed gives the same weights.

    torch's global generator is left as it was. Under FakeTensorMode the weights are fake; networks of libraries that
    look at numbers while they are built fail there.

    Args:
        name: of the registry; `torchvision:NAME` or `timm:NAME`, the library's own network with fresh weights; or
            `package.module:factory`, called with those of `num_classes` and `image_shape` that it accepts.
        image_shape: (C, H, W).
        num_classes: number of outputs.

    Raises:
        ConfigError: unknown name, image too small, or a factory that cannot be imported, fails, or returns
            something else than a module with `num_classes` outputs.
    """
    # devices=[]: weights are made on the CPU, whatever accelerators there are.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if is_factory(name):
            return build_by_factory(name, image_shape, num_classes)
        if ":" in name:
            return build_from_library(name, image_shape, num_classes)
        return build_registered(name, image_shape, num_classes)


def suggest_model(image_shape: tuple[int, int, int], num_train: int) -> str:
    """Names the default network: `convnet` for images below 32 pixels or few of them, else `vgg11_bn`.

    Args:
        image_shape: (C, H, W).
        num_train: training images; fewer than 1,000 are too few for millions of weights. [ours]
    """
    return "convnet" if min(image_shape[1:]) < 32 or num_train < 1000 else "vgg11_bn"
