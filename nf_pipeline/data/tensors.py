"""Samples that are no images: tensors of numbers and sequences of tokens, which are stored as they come.

Floating point numbers become float32, 8-bit numbers with a sign int16; whole numbers of 32 and 64 bits are tokens,
stored as int32: who means quantities by them converts them first, so that no one has to guess. Bytes with two axes,
or with three of which the last has 1, 3 or 4, are pixels, everything else a tensor. Knows nothing of the
columns that tensors come from. Entries: `tensor_inputs` for the first one, `stored_tensor` for each.
"""

import numpy as np
import pyarrow as pa

from nf_pipeline.data.base import Undecodable
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec

MAX_TOKENS = 2**31 - 1
"""More tokens than this cannot be told apart in int32."""

CHANNELS = (1, 3, 4)
"""Of pictures: grey, RGB, and RGB with transparency."""

_STORED = {
    "uint8": "uint8",
    "uint16": "uint16",
    "int8": "int16",
    "int16": "int16",
    "float16": "float32",
    "float32": "float32",
    "float64": "float32",
    "int32": "int32",
    "int64": "int32",
    "uint32": "int32",
}
_TOKEN_TYPES = ("int32", "int64", "uint32")
_ARROW_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_FIX_TYPE = f"convert it to one of {', '.join(_STORED)}"


def is_image(array: np.ndarray) -> bool:
    """Tells whether an array is pixels, [H, W] or [H, W, C] with C of `CHANNELS`, rather than a tensor."""
    return array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS))


def holds_numbers(kind: pa.DataType) -> bool:
    """Tells whether Arrow values of a type can be stored."""
    return _ARROW_NAMES.get(str(kind), str(kind)) in _STORED


def is_storable(dtype: np.dtype) -> bool:
    """Tells whether numbers of a type can be stored."""
    return dtype.name in _STORED


def tensor_inputs(tensor: np.ndarray, num_tokens: int | None) -> InputSpec:
    """Says what the samples of a data set are, by its first one.

    Args:
        tensor: any shape.
        num_tokens: as in the configuration: given, whole numbers of any type are tokens [ours]. Not given, tokens get
            the largest number for now: how many there are is known once all are read.

    Raises:
        DataError: its type cannot be stored, tokens are no sequence, `num_tokens` has nothing to count, or it could
            be a picture of many channels, with these last.
        Undecodable: it holds no numbers.
    """
    if not tensor.size or not tensor.ndim:
        raise Undecodable("it holds no numbers")
    name = tensor.dtype.name
    if name not in _STORED:
        raise DataError(f"numbers of type {name}, want one of {', '.join(_STORED)}", _FIX_TYPE)
    is_whole = tensor.dtype.kind in "iu"
    if num_tokens is not None and not is_whole:
        raise DataError(f"data.num_tokens is {num_tokens}, and the numbers are {name}", "leave data.num_tokens out")
    if name == "uint8" and tensor.ndim == 3 and tensor.shape[2] < tensor.shape[0]:
        # Whoever has bytes has pictures, most often: channels last would train without an error, and badly. [ours]
        raise DataError(
            f"uint8 of shape {tensor.shape}: tensors begin with their channels, and these could be last",
            f"transpose the column to (C, H, W); if they are {tensor.shape[0]} channels, convert it to int16",
        )
    if name not in _TOKEN_TYPES and num_tokens is None:
        return InputSpec(shape=tensor.shape, dtype=_STORED[name])
    if tensor.ndim != 1:
        raise DataError(
            f"{name} of shape {tensor.shape} would be tokens, want one sequence (L,) of them",
            "convert the column to float32, int16 or uint8 if its numbers are quantities",
        )
    return InputSpec(shape=tensor.shape, dtype="int32", num_tokens=num_tokens or MAX_TOKENS)


def stored_tensor(tensor: np.ndarray, inputs: InputSpec, *, with_nan: bool = False) -> np.ndarray:
    """Returns a tensor as it is stored: the same numbers in the type of the data set; shapes are the caller's.

    Args:
        tensor: any shape.
        inputs: what the samples are.
        with_nan: let numbers pass that are none, for whoever looks at them later.

    Raises:
        DataError: it holds numbers of another type, or a token out of range.
        Undecodable: it holds NaN or infinite numbers.
    """
    if inputs.num_tokens:
        return _tokens(tensor, inputs.num_tokens)
    if _STORED.get(tensor.dtype.name) != inputs.dtype:
        raise DataError(f"it holds {tensor.dtype}, want {inputs.dtype}", f"convert it to {inputs.dtype}")
    with np.errstate(over="ignore"):
        stored = tensor.astype(inputs.dtype, copy=False)
    if stored.dtype.kind == "f" and not with_nan and not np.isfinite(stored).all():
        raise Undecodable("it holds NaN, or numbers that are infinite or too large for float32")
    return stored


def _tokens(tensor: np.ndarray, num_tokens: int) -> np.ndarray:
    if tensor.dtype.kind not in "iu":
        raise DataError(f"it holds {tensor.dtype}, want tokens, which are whole numbers", "convert it to int32")
    wrong = (tensor < 0) | (tensor >= num_tokens)
    if wrong.any():
        raise DataError(
            f"token {tensor[wrong].flat[0]}, want 0 to {num_tokens - 1}",
            "correct or remove the row, or train with a larger data.num_tokens; quantities are trained on as float32",
        )
    return tensor.astype(np.int32, copy=False)
