"""Whatever an image file holds, it is decoded or refused as undecodable, in bounded memory."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from cases import fuzz, tried
from hypothesis import strategies as st
from junk import damaged
from PIL import Image

from nf_pipeline.data.decode import MAX_PIXELS, Undecodable, decode_image

SIZE = (9, 7)


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    """Encodes a small image with some structure in it."""
    ramp = np.arange(SIZE[0] * SIZE[1] * 4, dtype=np.uint8).reshape(SIZE[1], SIZE[0], 4)
    sink = io.BytesIO()
    Image.fromarray(ramp, "RGBA").convert("RGB").convert(mode).save(sink, kind, **options)
    return sink.getvalue()


def animated() -> bytes:
    frames = [Image.new("P", SIZE, value) for value in range(3)]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    return sink.getvalue()


SEEDS = {
    **{f"{mode}.png": encoded(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{f"{mode}.jpeg": encoded(mode, "JPEG") for mode in ("L", "RGB", "CMYK")},
    "progressive.jpeg": encoded("RGB", "JPEG", progressive=True),
    **{f"{mode}.bmp": encoded(mode, "BMP") for mode in ("1", "L", "P", "RGB")},
    **{f"{mode}.tiff": encoded(mode, "TIFF") for mode in ("1", "L", "RGB", "RGBA", "CMYK", "F", "I")},
    **{f"{c}.tiff": encoded("RGB", "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")},
    "RGB.webp": encoded("RGB", "WEBP"),
    "RGBA.webp": encoded("RGBA", "WEBP", lossless=True),
    "P.gif": encoded("P", "GIF"),
    "animated.gif": animated(),
    "RGB.ppm": encoded("RGB", "PPM"),
    "L.pgm": encoded("L", "PPM"),
}


def decoded(data: bytes, image_size: int | None) -> None:
    try:
        pixels = decode_image(data, image_size)
    except Undecodable as error:
        assert str(error)
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.size
    assert pixels.shape[1] * pixels.shape[2] <= MAX_PIXELS


sizes = st.sampled_from([None, 1, 8, 64])


@fuzz(
    "images: damaged files",
    quick=600,
    thorough=40_000,
    data=st.sampled_from(sorted(SEEDS)).flatmap(lambda name: damaged(SEEDS[name])),
    size=sizes,
)
def test_fuzz_image_file_with_damage_is_decoded_or_refused(data: bytes, size: int | None) -> None:
    decoded(data, size)


@fuzz("images: any bytes", quick=200, thorough=10_000, data=st.binary(max_size=300), size=sizes)
def test_fuzz_image_of_any_bytes_is_refused_or_decoded(data: bytes, size: int | None) -> None:
    decoded(data, size)


MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"P6\n",
)


@fuzz("images: magic numbers", quick=200, thorough=20_000, magic=st.sampled_from(MAGIC), data=st.binary(max_size=200))
def test_fuzz_image_that_only_begins_like_one_is_refused_or_decoded(magic: bytes, data: bytes) -> None:
    decoded(magic + data, None)


def png(width: int, height: int, bits: int, colour: int, body: bytes) -> bytes:
    """Writes a PNG whose header says what it likes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


dimensions = st.one_of(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 8191, 8192, 65_535, 65_536, 2**31 - 1, 2**31])
)


@fuzz(
    "images: sizes in headers",
    quick=150,
    thorough=4_000,
    width=dimensions,
    height=dimensions,
    bits=st.sampled_from([1, 2, 4, 8, 16, 3]),
    colour=st.integers(0, 6),
)
def test_fuzz_image_header_of_any_size_is_refused_or_decoded(width: int, height: int, bits: int, colour: int) -> None:
    if width * height <= MAX_PIXELS:
        width, height = width % 4096, height % 4096  # larger ones are decoded: correct, and slow
    decoded(png(width, height, bits, colour, b"\0" * 100), None)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_image_of_every_kind_is_decoded_or_refused_with_a_reason(name: str) -> None:
    tried("images: kinds")
    decoded(SEEDS[name], None)
    decoded(SEEDS[name], 8)
