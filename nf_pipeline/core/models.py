"""Builds networks by name: the registry's, those of torchvision and timm, or the user's own `package.module:factory`.

Knows nothing of layers or training. Entry: `build_model`.
"""

import torch
from torch import nn

from nf_pipeline.core.factory_models import build_by_factory
from nf_pipeline.core.library_models import build_from_library
from nf_pipeline.core.registry import build_registered
from nf_pipeline.core.spatial import PARTS
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec
from nf_pipeline.trust import is_factory


def build_model(name: str, *, inputs: InputSpec, num_outputs: int, seed: int) -> nn.Module:
    """Builds a network with float32 weights on the CPU; the same seed gives the same weights.

    torch's global generator is left as it was. Under FakeTensorMode the weights are fake; networks of libraries that
    look at numbers while they are built fail there.

    Args:
        name: of the registry; `torchvision:NAME` or `timm:NAME`, the library's own network with fresh weights; or
            `package.module:factory`, called with what it accepts of `input_shape`, `num_outputs` and others.
        inputs: what it takes.
        num_outputs: numbers that it returns for a sample.

    Raises:
        ConfigError: unknown name, samples that the network does not take, or a factory that cannot be imported,
            fails, or returns something else than a module with `num_outputs` outputs.
    """
    # devices=[]: weights are made on the CPU, whatever accelerators there are.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if is_factory(name):
            return build_by_factory(name, inputs, num_outputs)
        if ":" in name:
            return build_from_library(name, inputs, num_outputs)
        return build_registered(name, inputs, num_outputs)


def suggest_model(inputs: InputSpec, num_train: int) -> str:
    """Names the default network: `vgg11_bn` for images of 32 pixels or more and enough of them, else `convnet`.

    Args:
        inputs: what it takes.
        num_train: training samples; fewer than 1,000 are too few for millions of weights. [ours]

    Raises:
        ConfigError: no network here takes such samples.
    """
    if inputs.num_tokens or len(inputs.shape) - 1 not in PARTS:
        kind = "tokens" if inputs.num_tokens else "numbers"
        raise ConfigError(
            f"--model: none is the default for samples of shape {inputs.shape}, {kind}",
            "name your own: --model package.module:factory"
            + ("; whole numbers that are quantities: convert the column to float32" if inputs.num_tokens else ""),
        )
    if not inputs.is_image or min(inputs.shape[1:]) < 32 or num_train < 1000:
        return "convnet"
    return "vgg11_bn"
