"""The final model as a step of a data workflow: a batch of columns in, the same batch with predictions out.

    dataset.map_batches(Predictor, fn_constructor_kwargs={"uri": "s3://bucket/runs/first"}, concurrency=1)

Works on numpy batches of Ray Data, and on any mapping of numpy arrays without Ray. `classify` and `predict_values`
are what every prediction of this package goes through. Knows nothing of files or Ray. Entry: `Predictor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from nf_pipeline.config import DataConfig
from nf_pipeline.core.early_exit_model import EarlyExitModel
from nf_pipeline.core.exit_model import ExitModel
from nf_pipeline.data.base import RawImage, StoredImage, Unusable
from nf_pipeline.data.columns import likeliest_images, pixels_of
from nf_pipeline.data.decode import decode_stream
from nf_pipeline.data.images import resize_for
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.data.tensors import is_storable
from nf_pipeline.errors import ConfigError, DataError
from nf_pipeline.model_files import load_model

ADDED = ("prediction", "label_idx", "probability")

_IMAGES = "uint8 arrays [N, H, W(, C)], encoded bytes or {bytes, path}, or tensors [N, ...] of numbers"
_FIX_IMAGE = "name it: fn_constructor_kwargs={'uri': ..., 'image_column': NAME}"


@torch.no_grad()
def classify(model: ExitModel, stored_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs the final model on samples of its own shape and type, on the device that it is on.

    Args:
        model: see `load_model`; of classes.
        stored_N: [N, *shape], such as uint8 pixels.

    Returns:
        The likeliest label of each image, int64 [N], and its probability, float32 [N], with the model's temperature.
    """
    device = next(model.parameters()).device
    logits_NK = model(torch.from_numpy(stored_N).to(device))
    probabilities_NK = (logits_NK / model.card.temperature).softmax(dim=1)
    probability_N, label_N = probabilities_NK.max(dim=1)
    return label_N.cpu().numpy(), probability_N.cpu().numpy()


@torch.no_grad()
def predict_values(model: ExitModel, stored_N: np.ndarray) -> np.ndarray:
    """Runs the final model of values on samples of its own shape and type, on the device that it is on.

    Args:
        model: see `load_model`.
        stored_N: [N, *shape].

    Returns:
        Values in their own units, float32 [N, K].
    """
    device = next(model.parameters()).device
    return model(torch.from_numpy(stored_N).to(device)).cpu().numpy()


def classify_early(model: EarlyExitModel, stored_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs a model with early exits on samples of its own shape and type, on the device that it is on.

    Args:
        model: see `load_early_exit_model`.
        stored_N: [N, *shape], such as uint8 pixels.

    Returns:
        As `classify`, and the exit at which each image left, int64 [N].
    """
    device = next(model.parameters()).device
    logits_NK, exit_N = model(torch.from_numpy(stored_N).to(device))
    probability_N, label_N = logits_NK.softmax(dim=1).max(dim=1)
    return label_N.cpu().numpy(), probability_N.cpu().numpy(), exit_N.cpu().numpy()


class Predictor:
    """Adds `prediction` (class name), `label_idx` (int64) and `probability` (float32) to a batch.

    A model of values adds `prediction` (float32 [N, K], in their own units) only.

    Images are treated as by `nf-pipeline predict`: those of another size are resized where the model's are square,
    grey ones become RGB for a model of colour images. The model is loaded once, by whoever makes the object.

    Args:
        uri: STORE/NAME of a finished run.
        model: the factory, where the run was trained with one; registry models need nothing.
        image_column: found by its type when not given.
        keep_image: also return the image column, which is dropped otherwise.
        on_bad_image: "skip" leaves out rows whose image cannot be decoded.
        device: "cpu" or "cuda"; ask Ray for `num_gpus` as well to get a GPU of one's own.

    Raises:
        ObjectMissing: the run has no final model (yet).
        ConfigError: the device is not there, or the run names a factory that `model` does not.
    """

    def __init__(
        self,
        uri: str,
        *,
        model: str | None = None,
        image_column: str | None = None,
        keep_image: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: got 'cuda', and this process sees no GPU", "device='cpu', or num_gpus=1")
        self._model = load_model(uri, model=model).to(device)
        self._class_names = np.array(self._model.card.class_names)
        self._image_column = image_column
        self._keep_image = keep_image
        self._skipped = SkippedImages(on_bad_image)

    @property
    def num_skipped(self) -> int:
        """Images left out so far."""
        return self._skipped.num_images

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the batch with predictions, rows in the same order.

        Args:
            batch: column -> numpy array of N rows; the images are uint8 arrays [N, H, W] or [N, H, W, C] (or an
                object array of such images of any size), encoded files as bytes, or {bytes, path}; tensors are arrays
                [N, *shape] of other types, ranks or numbers of channels.

        Raises:
            ConfigError: it is no numpy batch, or has a column with the name of a result.
            DataError: the image column is not found, or an image cannot be decoded or has another shape.
        """
        _check_batch(batch, self._added)
        column = self._image_column or _find_images(batch)
        if column not in batch:
            raise DataError(f"batch: missing column {column!r}; it has {_described(batch)}", _FIX_IMAGE)
        parts = [self._nothing, *self._predict(batch[column], column)]
        rows, *predicted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        kept = {name: values[rows] for name, values in batch.items() if self._keep_image or name != column}
        return {**kept, **dict(zip(self._added, predicted, strict=True))}

    @property
    def _added(self) -> tuple[str, ...]:
        return ADDED if self._model.card.target.kind == "class" else ADDED[:1]

    @property
    def _nothing(self) -> tuple[np.ndarray, ...]:
        """What a batch without rows is given."""
        target = self._model.card.target
        rows = np.zeros(0, np.int64)
        if target.kind == "values":
            return rows, np.zeros((0, target.size), np.float32)
        return rows, self._class_names[rows], rows, np.zeros(0, np.float32)

    def _predicted(self, stored_N: np.ndarray) -> tuple[np.ndarray, ...]:
        if self._model.card.target.kind == "values":
            return (predict_values(self._model, stored_N),)
        label_N, probability_N = classify(self._model, stored_N)
        return self._class_names[label_N], label_N, probability_N

    def _predict(self, images: np.ndarray, column: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields rows that could be decoded, and their predictions."""
        inputs = self._model.card.inputs

        def where(row: int) -> str:
            return f"batch, row {row}, column {column!r}"

        for decoded in decode_stream(
            _cells(images),
            inputs=inputs,
            image_size=resize_for(inputs),
            threads=DataConfig().decode_threads,
            where=where,
        ):
            for row, reason in decoded.bad:
                self._skipped.add(where(row), reason)
            if len(decoded.rows):
                yield decoded.rows, *self._predicted(decoded.images)


def _check_batch(batch: Any, added: Sequence[str]) -> None:
    if not isinstance(batch, Mapping) or not all(isinstance(column, np.ndarray) for column in batch.values()):
        kind = f"{type(batch).__module__}.{type(batch).__qualname__}"
        raise ConfigError(
            f"batch: got {kind}, want a dict of numpy arrays", "map_batches(Predictor, batch_format='numpy', ...)"
        )
    taken = [name for name in added if name in batch]
    if taken:
        raise ConfigError(f"batch: it has the columns {taken} already", "rename them before the prediction")


def _find_images(batch: Mapping[str, np.ndarray]) -> str:
    best = likeliest_images({name: _rank(column) for name, column in batch.items()})
    if len(best) != 1:
        problem = f"columns {best} could all be the image" if best else f"no column holds images ({_IMAGES})"
        raise DataError(f"batch: {problem}; it has {_described(batch)}", _FIX_IMAGE)
    return best[0]


def _rank(column: np.ndarray) -> int | None:
    """Ranks how surely a column holds images, as `columns.image_rank` does for Arrow types."""
    if column.dtype != object:
        return _tensor_rank(column, column.ndim - 1)
    first = next((cell for cell in column if cell is not None), None)
    if isinstance(first, np.ndarray):
        return _tensor_rank(first, first.ndim)
    if isinstance(first, Mapping):
        return 0 if "bytes" in first else None
    return 3 if isinstance(first, bytes) else None


def _tensor_rank(array: np.ndarray, num_axes: int) -> int | None:
    if array.dtype == np.uint8 and num_axes in (2, 3):
        return 1
    return 4 if num_axes >= 1 and is_storable(array.dtype) else None


def _cells(images: np.ndarray) -> Iterator[RawImage]:
    for row, cell in enumerate(images):
        yield RawImage(row, _stored(cell))


def _stored(cell: Any) -> StoredImage:
    value = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(value, np.ndarray):
        return pixels_of(value) if is_storable(value.dtype) else Unusable(f"it is a {value.dtype} array, want uint8")
    if isinstance(value, bytes):
        return value or Unusable("it has no bytes")
    return Unusable("it is null" if value is None else f"it is a {type(value).__name__}, want {_IMAGES}")


def _described(batch: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name!r} ({column.dtype} {list(column.shape)})" for name, column in batch.items())
