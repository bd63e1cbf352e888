"""What is done with a finished model: predict, export.

Works in this process and streams the data; the run is only read. Entries: `predict`, `export`.
"""

import contextlib
import errno
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from nf_pipeline.config import DataConfig, images_config
from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.early_exit_model import EarlyExitModel
from nf_pipeline.core.exit_model import ExitModel
from nf_pipeline.data.images import open_images, resize_for
from nf_pipeline.data.predictor import classify, classify_early, predict_values
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.driver.early_exit_wish import EarlyExitWish
from nf_pipeline.errors import ConfigError, StorageError
from nf_pipeline.model_files import load_model
from nf_pipeline.samples import InputSpec, TargetSpec

_ID, _EXIT = pa.field("id", pa.string(), nullable=False), pa.field("exit", pa.string(), nullable=False)

CLASS_SCHEMA = pa.schema(
    [
        _ID,
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        _EXIT,
    ]
)
VALUE_SCHEMA = pa.schema([_ID, pa.field("prediction", pa.list_(pa.float32()), nullable=False), _EXIT])


def prediction_schema(target: TargetSpec) -> pa.Schema:
    """Returns the columns of the file that `predict` writes: of classes the likeliest one, else values in their own
    units."""
    return CLASS_SCHEMA if target.kind == "class" else VALUE_SCHEMA


def predict(
    uri: str,
    images: str,
    output: str,
    batch_size: int = 256,
    model: str | None = None,
    *,
    image_column: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    early_exits: EarlyExitWish | None = None,
) -> dict[str, Any]:
    """Runs the final model over every image of an input and writes one row per image to a Parquet file.

    Args:
        uri: STORE/NAME.
        images: a folder, file or URI of images or Parquet; labels are not needed.
        output: local file; replaced only when all predictions are in.
        batch_size: images per step.
        model: see `load_model`.
        image_column: of Parquet; found by its type when not given.
        on_bad_image: "skip" leaves out images that cannot be decoded.
        early_exits: lets images leave at exits before the final one, of a run that has kept them.

    Returns:
        rows, num_skipped, output, exit_layer, and with early exits rows_by_exit: layer of each exit -> rows.

    Raises:
        ConfigError: no operating point is as wished.
        ObjectMissing: the run has no final model (yet), or has kept no exits before it.
        DataError: an image cannot be decoded or has another size.
        StorageError: the output cannot be written.
    """
    loaded = load_model(uri, model=model) if early_exits is None else early_exits.load(uri, model)
    config = _input_config(images, loaded.card.inputs, image_column)
    skipped, rows = SkippedImages(on_bad_image), Counter()
    with _prediction_file(output, prediction_schema(loaded.card.target)) as write:
        for ids, stored_N in _batches(config, loaded.card.inputs, skipped, batch_size):
            predicted = _predictions(loaded, ids, stored_N)
            write(predicted)
            rows.update(predicted["exit"].to_pylist())
    return {
        "rows": rows.total(),
        "num_skipped": skipped.num_images,
        "output": output,
        "exit_layer": loaded.card.exit_layer,
        **({} if early_exits is None else {"rows_by_exit": {layer: rows[layer] for layer in loaded.exit_layers}}),
    }


def export(uri: str, format_name: str, output: str, model: str | None = None) -> str:
    """Writes the final model to a file that other programs read.

    Args:
        uri: STORE/NAME.
        format_name: "safetensors" (weights, and OUTPUT's name with .json beside them), or "torch-export" (a
            program for torch.export.load that takes stored samples, such as uint8 pixels_NCHW, with any N).
        output: local file.
        model: see `load_model`.

    Returns:
        The path written.

    Raises:
        ConfigError: unknown format, or a name for the weights that their description takes.
        StorageError: the file cannot be written.
    """
    makers = {"safetensors": _safetensors_files, "torch-export": _program_files}
    if format_name not in makers:
        raise ConfigError(f"export format {format_name!r} is unknown", f"--format {' or '.join(makers)}")
    target = Path(output)
    if format_name == "safetensors" and target.suffix.lower() == ".json":
        raise ConfigError(
            f"--output {output}: the name with .json is for the description beside the weights",
            f"--output {target.with_suffix('.safetensors')}",
        )
    with _write_errors("the model", output):
        _prepare_target(target)
    files = makers[format_name](load_model(uri, model=model), target)
    with _write_errors("the model", output):
        for path, data in files.items():
            with _whole_file("the model", path) as partial:
                partial.write_bytes(data)
    return str(target)


def _input_config(images: str, inputs: InputSpec, image_column: str | None) -> DataConfig:
    return images_config(source=images, image_size=resize_for(inputs), image_column=image_column)


def _batches(
    config: DataConfig, inputs: InputSpec, skipped: SkippedImages, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    ids, pixels = [], []
    for image_id, pixels_CHW in open_images(config, inputs, skipped):
        ids.append(image_id)
        pixels.append(pixels_CHW)
        if len(ids) == batch_size:
            yield ids, np.stack(pixels)
            ids, pixels = [], []
    if ids:
        yield ids, np.stack(pixels)


@contextlib.contextmanager
def _prediction_file(output: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that appends rows; the file appears under its name when the block ends well."""
    target = Path(output)
    with _write_errors("predictions", output):
        _prepare_target(target)
    with _whole_file("predictions", target) as partial:
        with _write_errors("predictions", output):
            writer = pq.ParquetWriter(partial, schema)

        def write(rows: pa.Table) -> None:
            with _write_errors("predictions", output):
                writer.write_table(rows)

        yield write
        with _write_errors("predictions", output):
            writer.close()


@contextlib.contextmanager
def _whole_file(what: str, target: Path) -> Iterator[Path]:
    """Yields a name beside the target, which replaces it when the block ends well: nobody meets half a file."""
    partial = target.with_name(f".{target.name}.part")
    try:
        yield partial
        with _write_errors(what, str(target)):
            partial.replace(target)
    finally:
        with contextlib.suppress(OSError):  # whatever ended the block says more than what follows from it
            partial.unlink(missing_ok=True)


def _prepare_target(target: Path) -> None:
    # mkdir, for one, says "File exists" of a file in a folder's place.
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if any(parent.exists() and not parent.is_dir() for parent in target.parents):
        raise NotADirectoryError(errno.ENOTDIR, "a part of its path is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _write_errors(what: str, output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"{what} cannot be written: {reason}", output, "give a writable --output") from error


def _predictions(model: ExitModel | EarlyExitModel, ids: list[str], stored_N: np.ndarray) -> pa.Table:
    schema = prediction_schema(model.card.target)
    columns = _class_columns(model, stored_N) if schema is CLASS_SCHEMA else _value_columns(model, stored_N)
    arrays = [pa.array(column, field.type) for column, field in zip([ids, *columns], schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _class_columns(model: ExitModel | EarlyExitModel, stored_N: np.ndarray) -> list[Any]:
    if isinstance(model, EarlyExitModel):
        labels, probabilities, exits = classify_early(model, stored_N)
        layers = [model.exit_layers[exit_idx] for exit_idx in exits]
    else:
        labels, probabilities = classify(model, stored_N)
        layers = [model.card.exit_layer] * len(labels)
    return [labels, [model.card.class_names[label] for label in labels], probabilities, layers]


def _value_columns(model: ExitModel, stored_N: np.ndarray) -> list[Any]:
    values_NK = predict_values(model, stored_N)
    return [list(values_NK), [model.card.exit_layer] * len(values_NK)]


def _safetensors_files(model: ExitModel, target: Path) -> dict[Path, bytes]:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    description = json.dumps(model.card.to_json(), indent=2)
    return {target: safetensors.torch.save(tensors), target.with_suffix(".json"): description.encode()}


def _program_files(model: ExitModel, target: Path) -> dict[Path, bytes]:
    # Two samples: with one, the exporter would take the batch for a constant.
    inputs = model.card.inputs
    stored_N = torch.zeros(2, *inputs.shape, dtype=TORCH_DTYPES[inputs.dtype])
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (stored_N,), dynamic_shapes=({0: batch},))
    data = io.BytesIO()
    torch.export.save(program, data)
    return {target: data.getvalue()}
