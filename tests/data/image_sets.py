"""Makes small data sets for the tests of this folder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nf_pipeline.config import RunConfig, validate_config

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Encodes uint8 [H, W] or [H, W, C]."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def pixels_of(value: int, size: int = 6, channels: int = 1) -> np.ndarray:
    """Returns an image whose every pixel holds a value that tells it from others."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.full(shape, value % 256, np.uint8)


def images(num: int, size: int = 6, channels: int = 1) -> list[bytes]:
    """Encodes `num` images, the i-th filled with i."""
    return [encode(pixels_of(value, size, channels)) for value in range(num)]


def write_parquet(
    path: Path,
    encoded: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    label_type: pa.DataType | None = None,
    row_group_size: int = 16,
    metadata: dict[bytes, bytes] | None = None,
    **names: str,
) -> None:
    """Writes {bytes, path} images and labels; `image` and `label` rename the columns."""
    cells = [None if data is None else {"bytes": data, "path": None} for data in encoded]
    table = pa.table(
        {
            names.get("image", "image"): pa.array(cells, IMAGE_TYPE),
            names.get("label", "label"): pa.array(labels, label_type),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group_size)


def make_config(source: Path | str, **data: Any) -> RunConfig:
    """Returns a configuration with this data."""
    return validate_config({"memory": {"budget_bytes": 10**8}, "data": {"source": str(source), **data}})
