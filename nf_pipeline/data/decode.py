"""Stored images -> uint8 [C, H, W], in parallel and in order, with a bound on what is in flight.

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

from nf_pipeline.data.base import ImageCell, RawImage, Unusable
from nf_pipeline.errors import DataError

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


class Undecodable(Exception):
    """An image cannot be decoded; the text says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedBatch:
    """Some rows, decoded.

    Attributes:
        rows: int64 [N], as the source numbers them.
        images: uint8 [N, C, H, W], contiguous.
        bad: rows that could not be decoded, with the reason.
    """

    rows: np.ndarray
    images: np.ndarray
    bad: tuple[tuple[int, str], ...]


def decode_image(cell: ImageCell, image_size: int | None = None) -> np.ndarray:
    """Decodes one image to uint8 [C, H, W], C of 1 or 3.

    Palettes become RGB, transparency is dropped, 16-bit grey keeps its upper 8 bits. The first frame counts.

    Args:
        cell: encoded bytes, pixels, Pillow's image, or a callable that fetches one of these.
        image_size: height and width to resize to (bilinear, antialiased, aspect ratio not kept); None keeps
            the image's own.

    Raises:
        Undecodable: damaged, of an unknown format or mode, or more than `MAX_PIXELS`.
    """
    try:
        stored = cell() if callable(cell) else cell
        if isinstance(stored, Unusable):
            raise Undecodable(stored.reason)
        if isinstance(stored, np.ndarray) and image_size is None:
            return _planes(stored)
        with _open(stored) as image:
            return _planes(np.asarray(_load(image, image_size)))
    except _DAMAGED as error:
        raise Undecodable(_reason(error)) from error


def fit_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Repeats grey as RGB where RGB is wanted, which loses nothing; everything else stays.

    Args:
        image: uint8 [C, H, W].
        channels: 1 or 3.
    """
    return np.repeat(image, 3, axis=0) if (len(image), channels) == (1, 3) else image


def decode_stream(
    images: Iterable[RawImage],
    *,
    shape: tuple[int, int, int],
    image_size: int | None,
    threads: int,
    where: Callable[[int], str],
) -> Iterator[DecodedBatch]:
    """Decodes a stream in threads and yields it in order.

    Holds at most `threads` + 2 batches of `_BATCH_BYTES` (encoded or decoded), or one image each if larger.

    Args:
        images: the stream, read in the calling thread.
        shape: (C, H, W) that every image must have; grey images become RGB where C is 3.
        image_size: as `decode_image`.
        threads: that decode.
        where: row -> text that names the image for errors.

    Raises:
        DataError: an image has another shape.
    """

    def decode(batch: list[RawImage]) -> DecodedBatch:
        return _decode_batch(batch, shape, image_size, where)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    in_flight: deque[Future[DecodedBatch]] = deque()
    try:
        for batch in _batches(images, max(1, min(_BATCH_IMAGES, _BATCH_BYTES // math.prod(shape)))):
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
    shape: tuple[int, int, int],
    image_size: int | None,
    where: Callable[[int], str],
) -> DecodedBatch:
    rows: list[int] = []
    bad: list[tuple[int, str]] = []
    images_NCHW = np.empty((len(batch), *shape), np.uint8)
    for row, cell in batch:
        try:
            image_CHW = fit_channels(decode_image(cell, image_size), shape[0])
        except Undecodable as error:
            bad.append((row, str(error)))
            continue
        if image_CHW.shape != shape:
            raise _mismatch(where(row), image_CHW.shape, shape)
        images_NCHW[len(rows)] = image_CHW
        rows.append(row)
    return DecodedBatch(rows=np.array(rows, np.int64), images=images_NCHW[: len(rows)], bad=tuple(bad))


def _open(stored: bytes | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(stored, Image.Image):
        return stored
    if isinstance(stored, np.ndarray):
        pixels = stored[:, :, 0] if stored.ndim == 3 and stored.shape[2] == 1 else stored
        return Image.fromarray(np.ascontiguousarray(pixels))
    return Image.open(io.BytesIO(stored), formats=FORMATS)


def _load(image: Image.Image, image_size: int | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Undecodable(f"{width}x{height} pixels, want at most {MAX_PIXELS}")
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


def _planes(pixels: np.ndarray) -> np.ndarray:
    # [H, W] or [H, W, C] -> [C, H, W], transparency dropped
    if pixels.ndim == 2:
        return pixels[None]
    return pixels[:, :, :3].transpose(2, 0, 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _mismatch(where: str, got: tuple[int, ...], want: tuple[int, int, int]) -> DataError:
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
