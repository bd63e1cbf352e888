"""Numbers as people write them: byte counts, "300MiB" in and "300.0 MiB" out; accuracies and errors out."""

import re

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
MAX_BYTES = 2**63 - 1
"""Largest byte count: what 64 bits hold with a sign, as files and Arrow count."""

_PATTERN = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", re.ASCII)
_SHOWN_CHARS = 40


def parse_bytes(text: str | int) -> int:
    """Turns "300MiB", "6 GiB", "1.5g" or a plain count into bytes.

    kB, MB, GB are powers of 1000; KiB, MiB, GiB and the bare letters K, M, G are powers of 1024.

    Raises:
        ValueError: the text is no number with a known unit, is less than one byte or more than `MAX_BYTES`.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return _in_range(text, f"{text}" if abs(text) <= MAX_BYTES else "a whole number of more than 63 bits")
    shown = repr(str(text)[:_SHOWN_CHARS])
    match = _PATTERN.fullmatch(str(text))
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"got {shown}, want a size such as '300MiB', '6GiB' or a count of bytes")
    number = float(match.group(1)) if "." in match.group(1) else int(match.group(1))
    return _in_range(int(number * factor), shown)


def _in_range(num_bytes: int, shown: str) -> int:
    if num_bytes < 1:
        raise ValueError(f"got {shown}, want at least 1 byte")
    if num_bytes > MAX_BYTES:
        raise ValueError(f"got {shown}, want at most {MAX_BYTES} bytes (8 EiB)")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Formats a byte count with one decimal and a binary unit, "64.0 MiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_accuracy(part: float, digits: int = 1) -> str:
    """Formats a part of 1 as per cent with so many digits behind the point, "61.3 %"."""
    return f"{100 * part:.{digits}f} %"


def format_error(part: float, digits: int = 1) -> str:
    """Formats an error, a part of the variance, "0.412": as exact as `format_accuracy` would write a part of 1."""
    return f"{part:.{digits + 2}f}"
