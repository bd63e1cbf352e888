"""Tensors out of safetensors bytes, or an error that names the object: sizes and types are checked, no code is run.

Entry: `read_tensors`.
"""

import safetensors.torch
import torch
from safetensors import SafetensorError

from nf_pipeline.errors import ObjectCorrupt


def read_tensors(data: bytes, where: str, fix: str = "") -> dict[str, torch.Tensor]:
    """Reads what `safetensors.torch.save` wrote.

    Args:
        data: the whole file.
        where: names the object in errors.
        fix: one action.

    Raises:
        ObjectCorrupt: it is no safetensors file, or has a type that torch lacks.
    """
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ObjectCorrupt(f"no safetensors file: {type(error).__name__}: {reason}", where, fix) from None
