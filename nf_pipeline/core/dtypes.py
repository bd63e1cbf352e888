"""The number types that samples are stored in, as torch knows them; their sizes stand in `nf_pipeline.dtypes`."""

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
