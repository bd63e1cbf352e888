"""The number types that samples are stored in, by name, and their sizes.

Storage and planning count bytes with the same table. Knows nothing of torch, which maps the names in
`nf_pipeline.core.dtypes`.
"""

ITEM_BYTES: dict[str, int] = {
    "uint8": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
}
