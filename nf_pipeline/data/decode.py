"""Stored images -> uint8 or uint16 [C, H, W], in parallel and in order, with a bound on what is in flight.

Tensors pass through: only their type, their range and their shape are looked at.

Pillow in threads: 32x32 JPEGs are limited by Python's lock (10,000 a second whatever the threads), larger
ones scale with cores, and JPEGs that get resized are decoded at a fraction of their size. torchvision.io is
three times faster on small JPEGs, but neither tells their size before it allocates, nor decodes a fraction,
and it loads torch.
Knows nothing of sources or splits. Entry: `decode_stream`, and `decode_image` for one.

Shapes: N images, C of 1 (grey) or 3 (RGB), H, W.
"""

import io
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nf_pipeline.data.base import ImageCell, RawImage, Undecodable, Unusable
from nf_pipeline.data.tensors import is_image, stored_tensor
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec

MAX_PIXELS = 64 * 2**20
"""Pixels of one image, compared with what its header says before anything is decoded: 256 MiB as RGBA."""
# Only decoders that neither run programs (EPS starts Ghostscript) nor follow references to other files.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

# What Pillow's decoders raise for damaged files; https://github.com/python-pillow/Pillow/issues/5279
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_GREY_MODES = ("1", "L", "LA", "La")
_GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_RGB_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")

_BATCH_IMAGES = 128
_BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedBatch:
    """Some rows, decoded.

    Attributes:
        rows: int64 [N], as the source numbers them.
        images: [N, *shape] of the stored type, contiguous.
        bad: rows that could not be decoded, with the reason.
    """

    rows: np.ndarray
    images: np.ndarray
    bad: tuple[tuple[int, str], ...]


def fetch(cell: ImageCell) -> bytes | np.ndarray | Image.Image:
    """Fetches a sample that may still be on a disk; nothing is decoded.

    Raises:
        Undecodable: there is none.
    """
    try:
        stored = cell() if callable(cell) else cell
    except _DAMAGED as error:
        raise Undecodable(_reason(error)) from error
    if isinstance(stored, Unusable):
        raise Undecodable(stored.reason)
    return stored


def decode_image(cell: ImageCell, image_size: int | None = None, pixels: str = "uint8") -> np.ndarray:
    """Decodes one image to uint8 or uint16 [C, H, W], C of 1 or 3.

    Palettes become RGB, transparency is dropped. As uint8, 16-bit grey keeps its upper 8 bits; as uint16 it keeps
    all, and of others 255 becomes 65535. The first frame counts.

    Args:
        cell: encoded bytes, pixels, Pillow's image, or a callable that fetches one of these.
        image_size: height and width to resize to (bilinear, antialiased, aspect ratio not kept); None keeps
            the image's own.
        pixels: "uint8" or "uint16".

    Raises:
        Undecodable: damaged, of an unknown format or mode, or more than `MAX_PIXELS`.
    """
    stored = fetch(cell)
    try:
        if isinstance(stored, np.ndarray) and image_size is None:
            return _of_depth(_planes(stored), pixels)
        with _open(stored) as image:
            if pixels == "uint16" and image.mode in _GREY_16_MODES:
                return _load_16(image, image_size)[None]
            return _of_depth(_planes(np.asarray(_load(image, image_size))), pixels)
    except _DAMAGED as error:
        raise Undecodable(_reason(error)) from error


def decode_sample(cell: ImageCell, inputs: InputSpec, image_size: int | None = None) -> np.ndarray:
    """Decodes one image as `decode_image` does, with grey as RGB where that is wanted, or passes a tensor on.

    Args:
        cell: as for `decode_image`, or a tensor.
        inputs: whose type it gets; shapes are the caller's.
        image_size: as for `decode_image`; tensors are not resized.

    Raises:
        Undecodable: as `decode_image`, or a tensor with NaN.
        DataError: numbers of another type, or a token out of range.
    """
    stored = fetch(cell)
    if isinstance(stored, np.ndarray) and not is_image(stored):
        return stored_tensor(stored, inputs)
    if inputs.dtype not in ("uint8", "uint16"):
        raise DataError(f"it is an image, want {inputs.dtype} of shape {inputs.shape}", "give tensors")
    return fit_channels(decode_image(stored, image_size, inputs.dtype), inputs.shape[0])


def fit_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Repeats grey as RGB where RGB is wanted, which loses nothing; everything else stays.

    Args:
        image: [C, H, W].
        channels: 1 or 3.
    """
    return np.repeat(image, 3, axis=0) if (len(image), channels) == (1, 3) else image


def decode_stream(
    images: Iterable[RawImage],
    *,
    inputs: InputSpec,
    image_size: int | None,
    threads: int,
    where: Callable[[int], str],
) -> Iterator[DecodedBatch]:
    """Decodes a stream in threads and yields it in order.

    Holds at most `threads` + 2 batches of `_BATCH_BYTES` (encoded or decoded), or one image each if larger.

    Args:
        images: the stream, read in the calling thread.
        inputs: shape and type that every image, or tensor, must have; grey images become RGB where C is 3.
        image_size: as `decode_image`.
        threads: that decode.
        where: row -> text that names the image for errors.

    Raises:
        DataError: an image or tensor has another shape or type, or a token is out of range.
    """

    def decode(batch: list[RawImage]) -> DecodedBatch:
        return _decode_batch(batch, inputs, image_size, where)

    nbytes = math.prod(inputs.shape) * ITEM_BYTES[inputs.dtype]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    in_flight: deque[Future[DecodedBatch]] = deque()
    try:
        for batch in _batches(images, max(1, min(_BATCH_IMAGES, _BATCH_BYTES // nbytes))):
            in_flight.append(pool.submit(decode, batch))
            if len(in_flight) > threads + 1:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(images: Iterable[RawImage], max_images: int) -> Iterator[list[RawImage]]:
    batch: list[RawImage] = []
    num_bytes = 0
    for image in images:
        batch.append(image)
        num_bytes += len(image.image) if isinstance(image.image, bytes) else 0
        if len(batch) >= max_images or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _decode_batch(
    batch: list[RawImage],
    inputs: InputSpec,
    image_size: int | None,
    where: Callable[[int], str],
) -> DecodedBatch:
    rows: list[int] = []
    bad: list[tuple[int, str]] = []
    samples_N = np.empty((len(batch), *inputs.shape), inputs.dtype)
    for row, cell in batch:
        try:
            sample = decode_sample(cell, inputs, image_size)
        except Undecodable as error:
            bad.append((row, str(error)))
            continue
        except DataError as error:
            raise DataError(f"{where(row)}: {error.what}", error.fix) from None
        if sample.shape != inputs.shape:
            raise _mismatch(where(row), sample.shape, inputs)
        samples_N[len(rows)] = sample
        rows.append(row)
    return DecodedBatch(rows=np.array(rows, np.int64), images=samples_N[: len(rows)], bad=tuple(bad))


def _open(stored: bytes | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(stored, Image.Image):
        return stored
    if isinstance(stored, np.ndarray):
        pixels = stored[:, :, 0] if stored.ndim == 3 and stored.shape[2] == 1 else stored
        return Image.fromarray(np.ascontiguousarray(pixels))
    return Image.open(io.BytesIO(stored), formats=FORMATS)


def _load(image: Image.Image, image_size: int | None) -> Image.Image:
    _check_size(image)
    if image_size is not None:
        # libjpeg decodes at 1/2, 1/4 or 1/8; twice the wanted size is left to the filter.
        image.draft(None, (2 * image_size, 2 * image_size))
    if image.mode in _GREY_16_MODES:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in _GREY_MODES:
        image = image.convert("L")
    elif image.mode in _RGB_MODES:
        image = image.convert("RGB")
    else:
        raise Undecodable(f"pixel mode {image.mode}, want 8 or 16 bits of grey, or 8-bit colour")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return image


def _load_16(image: Image.Image, image_size: int | None) -> np.ndarray:
    _check_size(image)
    grey_HW = np.asarray(image).astype(np.uint16)  # whatever byte order the file has
    if image_size is None or image.size == (image_size, image_size):
        return grey_HW
    floats = Image.fromarray(grey_HW.astype(np.float32))  # Pillow's filters know no 16 bits
    resized = floats.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.rint(np.asarray(resized)).clip(0, 65535).astype(np.uint16)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width}x{height} pixels, want at most {MAX_PIXELS}")


def _of_depth(image_CHW: np.ndarray, pixels: str) -> np.ndarray:
    return image_CHW if pixels == "uint8" else image_CHW.astype(np.uint16) * np.uint16(257)


def _planes(pixels: np.ndarray) -> np.ndarray:
    # [H, W] or [H, W, C] -> [C, H, W], transparency dropped
    if pixels.ndim == 2:
        return pixels[None]
    return pixels[:, :, :3].transpose(2, 0, 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _mismatch(where: str, got: tuple[int, ...], inputs: InputSpec) -> DataError:
    want = inputs.shape
    are_images = all(len(shape) == 3 and shape[0] in (1, 3) for shape in (got, want))
    if not are_images or inputs.dtype != "uint8":
        return DataError(
            f"{where}: its shape is {got}, want {want}", "give all the same shape: pad them, or cut them"
        )
    if got[0] != want[0]:
        return DataError(
            f"{where}: the image is in colour, the first one is grey (got {got}, want {want})",
            "convert all images to grey or all to colour",
        )
    return DataError(
        f"{where}: the image has {got[1]} rows of {got[2]} pixels, the first one {want[1]} of {want[2]} "
        f"(got {got}, want {want})",
        f"--image-size {want[1]}" if want[1] == want[2] else f"scale the images to {want[2]} by {want[1]} pixels",
    )
