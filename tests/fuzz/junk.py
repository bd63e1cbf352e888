"""Strategies for input that nobody should send: odd texts, numbers, JSON, and documents with one thing wrong."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HUGE_INTS = (0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), 10**400, 10**4000)
ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "..",
        "../x",
        "/",
        "/etc/passwd",
        "a/../b",
        "./x",
        "~",
        "~nobody/x",
        "C:\\x",
        "x" * 5000,
    ),
    *(
        "\n",
        "\r\n",
        "\x1b[31m",
        "\u202e",
        "\ufeff",
        "\udcff",
        "\ud800",
        "\u0661\u0662\u0663",
        "\uff11\uff12",
        "\U0001d7d9",
        "nan",
        "inf",
        "-inf",
        "1e999",
    ),
    *(
        "null",
        "None",
        "true",
        "[]",
        "{}",
        "[" * 3000,
        '{"a":' * 3000,
        "a.b.c",
        "=",
        "==",
        "#",
        "'",
        '"""',
        "%s%n",
        "$HOME",
    ),
    *(
        "s3://",
        "s3://b",
        "s3://b/../c",
        "s3:///x",
        "file://",
        "file:///",
        "file://host/x",
        "http://x/y",
        "://",
        "a://b",
    ),
    *(
        "9999999999999999TiB",
        "-1",
        "0",
        "1.5",
        "1.5e3",
        "1" * 400 + ".5MiB",
        "9" * 5000,
        "1 MiB",
        "1MiBs",
        "0.1b",
        "½GiB",
    ),
)

odd_texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=30))
odd_ints = st.one_of(st.sampled_from(HUGE_INTS), st.integers())
odd_floats = st.one_of(st.floats(), st.sampled_from([float("nan"), float("inf"), 1e308, 5e-324, -0.0]))
leaves = st.one_of(st.none(), st.booleans(), odd_ints, odd_floats, odd_texts)
odd_json = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_texts, inner, max_size=4)),
    max_leaves=12,
)


def as_json(value: Any) -> bytes:
    """Writes what Python can read back, big numbers and lone surrogates included."""
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def paths_in(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the place of every value inside a JSON document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Returns a copy with one value replaced; `REMOVED` takes it out."""
    copied = copy.deepcopy(document)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    if value is REMOVED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return copied


REMOVED = object()


def spoiled(document: Any) -> st.SearchStrategy[Any]:
    """Documents with one or two values replaced or removed."""
    one = st.tuples(st.sampled_from(list(paths_in(document))), st.one_of(st.just(REMOVED), leaves, odd_json))

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        result = document
        for path, value in changes:
            try:
                result = changed(result, path, value)
            except (KeyError, IndexError, TypeError):  # the first change took the place away
                continue
        return result

    return st.lists(one, min_size=1, max_size=2).map(apply)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes cut short, with some bytes changed, or with something inserted."""
    position = st.integers(0, max(0, len(data) - 1))

    def cut(at: int) -> bytes:
        return data[:at]

    def change(edits: list[tuple[int, int]]) -> bytes:
        copied = bytearray(data)
        for at, value in edits:
            copied[at] = value
        return bytes(copied)

    def insert(edit: tuple[int, bytes]) -> bytes:
        return data[: edit[0]] + edit[1] + data[edit[0] :]

    return st.one_of(
        position.map(cut),
        st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=6).map(change),
        st.tuples(position, st.binary(min_size=1, max_size=20)).map(insert),
    )
