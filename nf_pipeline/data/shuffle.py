"""Mixes a stream in bounded memory: stored order often is class order, and training must not see it.

Knows nothing of files. Entry: `shuffle_window`; sources interleave what they read with `interleave`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from nf_pipeline.data.base import RawImage

WINDOW_IMAGES = 16_384
WINDOW_BYTES = 64 * 2**20
OPEN_STREAMS = 8


def shuffle_window(
    images: Iterable[RawImage],
    rng: np.random.Generator,
    *,
    max_images: int = WINDOW_IMAGES,
    max_bytes: int = WINDOW_BYTES,
) -> Iterator[RawImage]:
    """Collects images until a bound is met, yields them in random order, and starts again.

    Args:
        images: the stream.
        rng: decides the order.
        max_images, max_bytes: bounds of what is held; one image more than `max_bytes` can be.

    Invariants:
        Yields exactly what came in; the same order for the same input and generator state.
    """
    window: list[RawImage] = []
    held_bytes = 0
    for image in images:
        window.append(image)
        held_bytes += _num_bytes(image)
        if len(window) >= max_images or held_bytes >= max_bytes:
            yield from _drain(window, rng)
            held_bytes = 0
    yield from _drain(window, rng)


def interleave(
    streams: Iterable[Callable[[], Iterator[RawImage]]], *, num_open: int = OPEN_STREAMS, run: int = 64
) -> Iterator[RawImage]:
    """Reads several streams in turns, so that a window sees more than one stretch of a sorted data set.

    Args:
        streams: openers, called when their turn comes.
        num_open: streams open at the same time.
        run: images taken from one stream before the next has its turn.
    """
    waiting = iter(streams)
    active = [opener() for opener in islice(waiting, num_open)]
    while active:
        still_active = []
        for stream in active:
            images = list(islice(stream, run))
            yield from images
            if len(images) == run:
                still_active.append(stream)
            else:
                still_active.extend(opener() for opener in islice(waiting, 1))
        active = still_active


def _drain(window: list[RawImage], rng: np.random.Generator) -> Iterator[RawImage]:
    for position in rng.permutation(len(window)):
        yield window[position]
    window.clear()


def _num_bytes(image: RawImage) -> int:
    stored = image.image
    if isinstance(stored, np.ndarray):
        return stored.nbytes
    return len(stored) if isinstance(stored, bytes) else 256
