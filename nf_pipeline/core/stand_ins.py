"""Made-up batches that stand in for stored samples where only their shape, type and cost count.

Knows nothing of what is done with them. Entries: `zeros`, `noise`, and `numbers`, which describes activations.
"""

import torch

from nf_pipeline.samples import InputSpec, TargetSpec

_CPU = torch.device("cpu")


def numbers(shape: tuple[int, ...]) -> InputSpec:
    """Describes samples that layers are given as float32, such as what the layers before return.

    Args:
        shape: of one sample.
    """
    return InputSpec(shape=tuple(shape), dtype="float32")


def zeros(inputs: InputSpec, batch_size: int, device: torch.device = _CPU) -> torch.Tensor:
    """Returns a batch as the first layer gets it: int64 tokens, or float32."""
    dtype = torch.int64 if inputs.num_tokens else torch.float32
    return torch.zeros(batch_size, *inputs.shape, dtype=dtype, device=device)


def noise(
    inputs: InputSpec, batch_size: int, device: torch.device = _CPU, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Returns a batch of any tokens that there are, or of normally distributed numbers.

    Args:
        inputs: what is made up.
        batch_size: samples.
        device: of the generator, too.
        generator: None draws from torch's global one.
    """
    size = (batch_size, *inputs.shape)
    if inputs.num_tokens:
        return torch.randint(inputs.num_tokens, size, generator=generator, device=device)
    return torch.randn(size, generator=generator, device=device)


def labels(target: TargetSpec, batch_size: int, device: torch.device = _CPU) -> torch.Tensor:
    """Returns labels as training gets them: int64 classes [N], or float32 values [N, K]."""
    if target.kind == "class":
        return torch.zeros(batch_size, dtype=torch.int64, device=device)
    return torch.zeros(batch_size, target.size, device=device)
