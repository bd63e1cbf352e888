"""Which samples of a split a classifier got right: one integer whose bit i stands for sample i in stored order.

All exits see the same samples, so counting what one got right and another did not takes `(a & ~b).bit_count()`. As
text, an eighth of a byte and a third more per sample: half a megabyte for 100,000 samples and 30 exits. Knows nothing
of models and stores. Entries: `hits_of`, `hits_to_text`, `hits_from_text`.
"""

import base64
import binascii

import numpy as np


def hits_of(right_N: np.ndarray) -> int:
    """Packs a yes or no per sample, bool [N]."""
    return int.from_bytes(np.packbits(right_N, bitorder="little").tobytes(), "little")


def unpacked(hits: int, num_samples: int) -> np.ndarray:
    """Returns what `hits_of` was given, bool [num_samples]."""
    flat = np.frombuffer(hits.to_bytes(_num_bytes(num_samples), "little"), np.uint8)
    return np.unpackbits(flat, count=num_samples, bitorder="little").astype(bool)


def hits_to_text(hits: int, num_samples: int) -> str:
    """Returns the bits in base64, for a JSON document."""
    return base64.b64encode(hits.to_bytes(_num_bytes(num_samples), "little")).decode()


def hits_from_text(text: str, num_samples: int) -> int:
    """Reads what `hits_to_text` returned.

    Raises:
        ValueError: it is no base64, or of another number of samples.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from None
    hits = int.from_bytes(data, "little")
    if len(data) != _num_bytes(num_samples) or hits.bit_length() > num_samples:
        raise ValueError(f"got {len(data)} bytes up to bit {hits.bit_length()}, want those of {num_samples} samples")
    return hits


def _num_bytes(num_samples: int) -> int:
    return -(-num_samples // 8)
