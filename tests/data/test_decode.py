import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import encode, pixels_of
from PIL import Image

from nf_pipeline.data.base import RawImage, Unusable
from nf_pipeline.data.decode import Undecodable, decode_image, decode_stream, fit_channels
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (9, 7), np.uint8)


def saved(image, kind="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def stream(cells, shape=(1, 6, 6), **changed):
    arguments = {"image_size": None, "threads": 3, "where": lambda row: f"f.parquet, row {row}"} | changed
    rows = (RawImage(row, cell) for row, cell in enumerate(cells))
    return decode_stream(rows, inputs=InputSpec(shape=shape), **arguments)


def test_colour_png_decodes_to_its_planes():
    np.testing.assert_array_equal(decode_image(encode(COLOUR)), COLOUR.transpose(2, 0, 1))


def test_grey_png_decodes_to_one_plane():
    np.testing.assert_array_equal(decode_image(encode(GREY)), GREY[None])


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_lossless_formats_decode_to_the_same_pixels(kind):
    np.testing.assert_array_equal(decode_image(encode(GREY, kind))[-1], GREY)


def test_transparency_is_dropped():
    rgba = np.dstack([COLOUR, np.full((9, 7), 7, np.uint8)])

    np.testing.assert_array_equal(decode_image(encode(rgba)), COLOUR.transpose(2, 0, 1))


def test_palette_becomes_rgb():
    palette = Image.fromarray(COLOUR).quantize(256)

    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(saved(palette)), expected)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(GREY).convert("1"), "PNG"),
        (Image.fromarray(GREY), "PNG"),
        (Image.fromarray(GREY).convert("LA"), "PNG"),
        (Image.fromarray(COLOUR).quantize(256), "PNG"),
        (Image.fromarray(COLOUR).convert("RGBA"), "PNG"),
        (Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
@pytest.mark.parametrize("image_size", [None, 5])
def test_an_opened_image_decodes_like_its_file(image, kind, image_size):
    decoded = decode_image(lambda: image.copy(), image_size)

    np.testing.assert_array_equal(decoded, decode_image(saved(image, kind), image_size))
    assert decoded.max() > 1


def test_what_fetching_an_image_raises_makes_it_undecodable():
    def fetch():
        raise OSError("image file is truncated")

    with pytest.raises(Undecodable, match="image file is truncated"):
        decode_image(fetch)


def test_16_bit_grey_keeps_its_upper_8_bits():
    deep = (GREY.astype(np.uint16) << 8) | 200

    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(deep))), GREY[None])


DEEP = RNG.integers(0, 2**16, (9, 7), np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_all_bits_where_these_are_asked_for(kind):
    kept = decode_image(saved(Image.fromarray(DEEP), kind), pixels="uint16")

    assert kept.dtype == np.uint16
    np.testing.assert_array_equal(kept, DEEP[None])


def test_16_bit_grey_of_the_other_byte_order_is_the_same():
    swapped = Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes())

    np.testing.assert_array_equal(decode_image(lambda: swapped, pixels="uint16"), DEEP[None])


def test_8_bits_are_scaled_to_16():
    np.testing.assert_array_equal(decode_image(encode(GREY), pixels="uint16"), GREY[None] * np.uint16(257))
    np.testing.assert_array_equal(decode_image(COLOUR, pixels="uint16")[2], COLOUR[:, :, 2] * np.uint16(257))


def test_resized_16_bit_grey_stays_between_its_neighbours():
    ramp = np.repeat(np.linspace(0, 65535, 32).astype(np.uint16)[None], 32, axis=0)
    resized = decode_image(saved(Image.fromarray(ramp)), image_size=8, pixels="uint16")

    assert (resized.shape, resized.dtype) == ((1, 8, 8), np.uint16)
    assert (np.diff(resized[0].astype(int), axis=1) > 6000).all() and (
        np.diff(resized[0].astype(int), axis=0) == 0
    ).all()


def test_float_pixels_are_undecodable_and_the_mode_is_named():
    with pytest.raises(Undecodable, match="pixel mode F"):
        decode_image(saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"))


def test_cmyk_jpeg_becomes_rgb():
    assert decode_image(saved(Image.fromarray(COLOUR).convert("CMYK"), "JPEG")).shape == (3, 9, 7)


@pytest.mark.parametrize("cell", [encode(COLOUR), COLOUR, encode(COLOUR, "JPEG")])
def test_resizing_gives_the_asked_size_for_bytes_and_arrays(cell):
    resized = decode_image(cell, image_size=4)

    assert resized.shape == (3, 4, 4)
    assert abs(resized.mean() - COLOUR.mean()) < 25


def test_resizing_a_large_jpeg_agrees_with_resizing_all_its_pixels():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    exact = np.asarray(Image.fromarray(ramp).resize((8, 8), Image.Resampling.BILINEAR))

    resized = decode_image(encode(ramp, "JPEG"), image_size=8)

    assert abs(resized[0].astype(int) - exact).max() <= 4


def test_arrays_with_one_channel_or_transparency_decode():
    np.testing.assert_array_equal(decode_image(GREY[:, :, None]), GREY[None])
    assert decode_image(np.zeros((4, 5, 4), np.uint8)).shape == (3, 4, 5)
    assert decode_image(GREY[:, :, None], image_size=3).shape == (1, 3, 3)


def test_text_is_undecodable():
    with pytest.raises(Undecodable, match="no image of a known format"):
        decode_image(b"hello, this is text")


def test_postscript_is_not_run():
    with pytest.raises(Undecodable, match="no image of a known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    bomb = saved(Image.new("1", (9_000, 9_000)))

    assert len(bomb) < 100_000
    with pytest.raises(Undecodable, match="9000x9000 pixels"):
        decode_image(bomb)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]), st.data())
def test_damaged_images_raise_nothing_but_undecodable(kind, data):
    damaged = bytearray(encode(COLOUR, kind))
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        assert decode_image(bytes(damaged)).dtype == np.uint8
    except Undecodable as error:
        assert str(error)


def test_grey_fits_colour_by_repetition_and_colour_never_fits_grey():
    assert fit_channels(GREY[None], 3).shape == (3, 9, 7)
    assert fit_channels(COLOUR.transpose(2, 0, 1), 1).shape == (3, 9, 7)


def test_stream_keeps_the_order_whatever_the_threads():
    cells = [encode(pixels_of(value)) for value in range(700)]

    batches = list(stream(cells, threads=4))

    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(700))
    values = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(values, np.arange(700) % 256)


def test_stream_lists_what_it_cannot_decode():
    cells = [encode(pixels_of(1)), b"junk", lambda: Unusable("it is null"), lambda: encode(pixels_of(2))]

    (batch,) = stream(cells)

    assert batch.rows.tolist() == [0, 3]
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2]
    assert [(row, reason[:8]) for row, reason in batch.bad] == [(1, "no image"), (2, "it is nu")]


def test_another_size_is_an_error_with_both_sizes_and_the_flag():
    cells = [encode(pixels_of(1)), encode(pixels_of(1, size=8))]

    with pytest.raises(DataError, match=r"f.parquet, row 1.*8 rows of 8 pixels.*6 of 6") as caught:
        list(stream(cells))
    assert "--image-size 6" in str(caught.value)


def test_colour_in_a_grey_data_set_is_an_error():
    with pytest.raises(DataError, match=r"row 0.*in colour, the first one is grey"):
        list(stream([encode(pixels_of(1, channels=3))]))


def test_stream_reads_no_further_ahead_than_its_bound():
    read = []

    def cells():
        for row in range(5000):
            read.append(row)
            yield RawImage(row, encode(pixels_of(0)))

    batches = decode_stream(cells(), inputs=InputSpec(shape=(1, 6, 6)), image_size=None, threads=2, where=str)
    next(batches)
    batches.close()

    assert len(read) <= 4 * 128


def test_closing_a_stream_ends_its_threads():
    batches = stream([encode(pixels_of(0))] * 1000)
    next(batches)
    batches.close()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
