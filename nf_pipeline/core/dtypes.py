"""Number types: those that samples are stored in, as torch knows them, and those that losses are computed in.

The sizes of the former stand in `nf_pipeline.dtypes`.
"""

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int32": torch.int32,
}


def precise(x: torch.Tensor) -> torch.Tensor:
    """Returns the same numbers in float32 at least, in which losses are computed also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
