"""What is done with a finished run: evaluate every exit, predict, export.

Works in this process and streams the data; the run is only read. Entries: `evaluate`, `predict`, `export`.
"""

import contextlib
import errno
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from nf_pipeline.config import DataConfig, images_config
from nf_pipeline.core.early_exit_model import EarlyExitModel
from nf_pipeline.core.exit_model import ExitModel, Normalise
from nf_pipeline.data.images import open_images, open_labelled, resize_for
from nf_pipeline.data.predictor import classify, classify_early
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.driver.run_record import load_plan, load_run
from nf_pipeline.errors import ConfigError, DataError, StorageError
from nf_pipeline.model_files import load_early_exit_model, load_model
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store
from nf_pipeline.trust import confirm_factory
from nf_pipeline.worker.assemble import load_units
from nf_pipeline.worker.stage_input import read_block, read_ingest, read_model

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("exit", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class EarlyExitWish:
    """Which operating point of early exits to take; see `nf_pipeline.core.early_exit_model.EarlyExitModel`.

    Without a wish images leave where that costs no accuracy on the validation split.

    Attributes:
        accuracy: on the validation split, in [0, 1], at least.
        flops: mean of one image there, at most.
    """

    accuracy: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        """Refuses two wishes at once.

        Raises:
            ConfigError: both are given.
        """
        if self.accuracy is not None and self.flops is not None:
            raise ConfigError(f"early exits: got accuracy {self.accuracy:g} and flops {self.flops:g}", "give one")


@torch.no_grad()
def evaluate(uri: str, data: DataConfig, model: str | None = None) -> list[dict[str, Any]]:
    """Measures every exit of a finished run on a labelled set, in one pass.

    Args:
        uri: STORE/NAME.
        data: its test split if it brings one, else all its rows.
        model: see `load_model`.

    Returns:
        One entry per exit: exit (its position in the summary's exits), layer_idx, layer, accuracy in [0, 1],
        num_images, chosen.

    Raises:
        ObjectMissing: the run is not finished.
        DataError: the data set cannot be used with this model.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    result = read_model(store, layout).facts
    plan, config, ingest = load_plan(store, layout), load_run(uri, model=model), read_ingest(store, layout).facts
    confirm_factory(plan.model, model)
    num_units = len(result["exits"])  # a run that stopped early has fewer than its plan
    blocks = [read_block(store, layout, block.block_idx) for block in plan.blocks if block.units[0] < num_units]
    units = [unit.eval() for unit in load_units(store, config, plan, blocks, num_units)]
    normalise = Normalise(ingest["mean"], ingest["std"])
    correct, num_images = np.zeros(len(units), np.int64), 0
    for batch in open_labelled(data, plan.image_shape, tuple(ingest["class_names"])):
        x_NCHW = normalise(torch.from_numpy(batch.images))
        for position, unit in enumerate(units):
            x_NCHW, logits_NK = unit(x_NCHW)
            correct[position] += int((logits_NK.argmax(dim=1).numpy() == batch.labels).sum())
        num_images += len(batch.labels)
    if num_images == 0:
        raise DataError(f"{data.source}: no images to evaluate", "give a labelled data set with images")
    return [
        {
            "exit": position,
            "layer_idx": exit["layer_idx"],
            "layer": exit["layer"],
            "accuracy": int(count) / num_images,
            "num_images": num_images,
            "chosen": position == result["chosen_exit"],
        }
        for position, (exit, count) in enumerate(zip(result["exits"], correct, strict=True))
    ]


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
    loaded = load_model(uri, model=model) if early_exits is None else _wished(uri, model, early_exits)
    config = _input_config(images, loaded.card.image_shape, image_column)
    skipped, rows = SkippedImages(on_bad_image), Counter()
    with _prediction_file(output) as write:
        for ids, pixels_NCHW in _batches(config, loaded.card.image_shape, skipped, batch_size):
            predicted = _predictions(loaded, ids, pixels_NCHW)
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
            program for torch.export.load that takes uint8 pixels_NCHW with any N).
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


def _input_config(images: str, shape: tuple[int, int, int], image_column: str | None) -> DataConfig:
    return images_config(source=images, image_size=resize_for(shape), image_column=image_column)


def _batches(
    config: DataConfig, shape: tuple[int, int, int], skipped: SkippedImages, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    ids, pixels = [], []
    for image_id, pixels_CHW in open_images(config, shape, skipped):
        ids.append(image_id)
        pixels.append(pixels_CHW)
        if len(ids) == batch_size:
            yield ids, np.stack(pixels)
            ids, pixels = [], []
    if ids:
        yield ids, np.stack(pixels)


@contextlib.contextmanager
def _prediction_file(output: str) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that appends rows; the file appears under its name when the block ends well."""
    target = Path(output)
    with _write_errors("predictions", output):
        _prepare_target(target)
    with _whole_file("predictions", target) as partial:
        with _write_errors("predictions", output):
            writer = pq.ParquetWriter(partial, PREDICTION_SCHEMA)

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


def _wished(uri: str, model: str | None, wish: EarlyExitWish) -> EarlyExitModel:
    loaded = load_early_exit_model(uri, model=model)
    if wish.accuracy is not None:
        return loaded.with_accuracy(wish.accuracy)
    return loaded if wish.flops is None else loaded.with_flops(wish.flops)


def _predictions(model: ExitModel | EarlyExitModel, ids: list[str], pixels_NCHW: np.ndarray) -> pa.Table:
    if isinstance(model, EarlyExitModel):
        labels, probabilities, exits = classify_early(model, pixels_NCHW)
        layers = [model.exit_layers[exit_idx] for exit_idx in exits]
    else:
        labels, probabilities = classify(model, pixels_NCHW)
        layers = [model.card.exit_layer] * len(ids)
    columns = [
        ids,
        labels,
        [model.card.class_names[label] for label in labels],
        probabilities,
        layers,
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, PREDICTION_SCHEMA, strict=True)],
        schema=PREDICTION_SCHEMA,
    )


def _safetensors_files(model: ExitModel, target: Path) -> dict[Path, bytes]:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    description = json.dumps(model.card.to_json(), indent=2)
    return {target: safetensors.torch.save(tensors), target.with_suffix(".json"): description.encode()}


def _program_files(model: ExitModel, target: Path) -> dict[Path, bytes]:
    # Two images: with one, the exporter would take the batch for a constant.
    pixels_NCHW = torch.zeros(2, *model.card.image_shape, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (pixels_NCHW,), dynamic_shapes={"pixels_NCHW": {0: batch}})
    data = io.BytesIO()
    torch.export.save(program, data)
    return {target: data.getvalue()}
