"""Whatever a data set holds, ingest stores it or says what is wrong with it."""

import io
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cases import documented, fuzz, scratch_folder
from hypothesis import strategies as st
from junk import damaged, odd_texts
from PIL import Image

from nf_pipeline.config import validate_config
from nf_pipeline.data.ingest import ingest
from nf_pipeline.errors import DataError, NFError
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store

COUNTER = itertools.count()


def png(value: int, size: tuple[int, int] = (6, 6), mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
good_png = st.integers(0, 255).map(png)
odd_png = st.one_of(
    good_png,
    st.just(png(3, (7, 5))),
    st.just(png(3, (6, 6), "RGB")),
    st.just(png(3, (1, 1))),
    st.sampled_from(
        [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html></html>", b"PK\x03\x04", b"%!PS-Adobe"]
    ),
    st.binary(max_size=40),
    st.none(),
)
TENSOR = pa.fixed_shape_tensor(pa.uint8(), [6, 6])

IMAGE_TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "struct": (STRUCT, st.one_of(st.none(), odd_png.map(lambda data: {"bytes": data, "path": None}))),
    "good": (STRUCT, good_png.map(lambda data: {"bytes": data, "path": None})),
    "binary": (pa.binary(), odd_png),
    "large_binary": (pa.large_binary(), odd_png),
    "binary_view": (pa.binary_view(), odd_png),
    "fixed": (pa.binary(4), st.one_of(st.none(), st.binary(min_size=4, max_size=4))),
    "text": (pa.string(), st.one_of(st.none(), st.text(max_size=5))),
    "nested": (
        pa.list_(pa.list_(pa.uint8())),
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.lists(st.integers(0, 255), max_size=3)), max_size=3)),
    ),
    "square": (pa.list_(pa.list_(pa.uint8())), st.just([[1, 2], [3, 4]])),
    "deep": (pa.list_(pa.list_(pa.list_(pa.list_(pa.uint8())))), st.just([[[[1]]]])),
    "tensor": (TENSOR, st.one_of(st.none(), st.lists(st.integers(0, 255), min_size=36, max_size=36))),
    "floats": (pa.list_(pa.list_(pa.float32())), st.just([[0.5]])),
    "numbers": (pa.int64(), st.integers(-5, 5)),
    "null": (pa.null(), st.none()),
    "odd struct": (pa.struct([("bytes", pa.string())]), st.just({"bytes": "x"})),
    "struct in struct": (pa.struct([("bytes", STRUCT)]), st.just({"bytes": {"bytes": b"", "path": ""}})),
}
LABEL_TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "good": (pa.int64(), st.integers(0, 1)),
    "numbers": (pa.int64(), st.one_of(st.none(), st.integers(-2, 3), st.sampled_from([2**62, -(2**63)]))),
    "bytes": (pa.uint8(), st.integers(0, 2)),
    "uint64": (pa.uint64(), st.sampled_from([0, 1, 2**63, 2**64 - 1])),
    "text": (pa.string(), st.one_of(st.none(), st.sampled_from(["", "a", "b", "\n", "ü" * 50]))),
    "large_text": (pa.large_string(), st.sampled_from(["a", "b"])),
    "text_view": (pa.string_view(), st.sampled_from(["a", "b"])),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), st.one_of(st.none(), st.sampled_from(["a", "b"]))),
    "number dictionary": (pa.dictionary(pa.int8(), pa.int64()), st.sampled_from([0, 1, 5])),
    "floats": (pa.float64(), st.sampled_from([0.0, 1.0, float("nan")])),
    "booleans": (pa.bool_(), st.booleans()),
    "decimals": (pa.decimal128(5), st.just(None)),
    "dates": (pa.date32(), st.just(None)),
    "lists": (pa.list_(pa.int64()), st.just([1])),
    "null": (pa.null(), st.none()),
    "binary": (pa.binary(), st.just(b"a")),
}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Tables with an image and a label column of some type, and perhaps more columns or twice the same."""
    kind, cells = IMAGE_TYPES[
        draw(st.one_of(st.sampled_from(["good", "struct"]), st.sampled_from(sorted(IMAGE_TYPES))))
    ]
    label_kind, labels = LABEL_TYPES[draw(st.one_of(st.just("good"), st.sampled_from(sorted(LABEL_TYPES))))]
    rows = draw(st.sampled_from([0, 1, 2, 3, 8, 20, 20, 20]))
    images = draw(st.lists(cells, min_size=rows, max_size=rows))
    storage = pa.array(images, kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)
    column = pa.ExtensionArray.from_storage(kind, storage) if isinstance(kind, pa.BaseExtensionType) else storage
    arrays = [column, pa.array(draw(st.lists(labels, min_size=rows, max_size=rows)), label_kind)]
    names = [
        draw(st.sampled_from(["image"] * 6 + ["img", "x.y", "", "label"])),
        draw(st.sampled_from(["label"] * 6 + ["class", "Label", "image"])),
    ]
    if draw(st.integers(0, 5)) == 0:
        arrays.append(pa.array([None] * rows, draw(st.sampled_from([pa.binary(), pa.int64(), pa.string()]))))
        names.append(draw(st.sampled_from(["image", "label", "image.bytes", "other", "targets"])))
    metadata = draw(
        st.sampled_from(
            [
                None,
                None,
                {b"huggingface": b"["},
                {b"huggingface": b"[" * 5000},
                {b"huggingface": NAMES},
                {b"huggingface": b'{"info": {"features": {"label": {"names": ["a", "\\ud800"]}}}}'},
            ]
        )
    )
    return pa.table(arrays, names=names).replace_schema_metadata(metadata)


NAMES = b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}'


def ingested(source: Path | str, **data: Any) -> Any:
    """Runs ingest in a store of its own; returns what it raised or None."""
    store = scratch_folder() / f"store-{next(COUNTER)}"
    try:
        document = {
            "memory": {"budget_bytes": 10**8},
            "storage": {"uri": str(store)},
            "data": {"source": str(source), "decode_threads": 1, **data},
        }
        return documented(
            lambda: list(ingest(open_store(str(store)), RunLayout("r"), validate_config(document), "a"))
        )
    finally:
        shutil.rmtree(store, ignore_errors=True)


settings_of_data = st.sampled_from(
    [
        {},
        {},
        {"on_bad_image": "skip"},
        {"image_size": 4},
        {"max_train_images": 3},
        {"label_column": "label"},
        {"image_column": "image"},
    ]
)


@fuzz(
    "data: Parquet tables",
    quick=150,
    thorough=4_000,
    table=tables(),
    data=settings_of_data,
    options=st.sampled_from(
        [{}, {}, {"compression": "zstd"}, {"use_dictionary": False}, {"row_group_size": 3}, {"store_schema": False}]
    ),
)
def test_fuzz_parquet_table_of_any_types_is_ingested_or_explained(
    table: pa.Table, data: dict[str, Any], options: dict[str, Any]
) -> None:
    file = scratch_folder() / "table.parquet"
    try:
        pq.write_table(table, file, **options)
    except (pa.ArrowException, ValueError):  # Parquet has no such column
        return
    outcome = ingested(file, **data)
    assert isinstance(outcome, list | DataError), repr(outcome)


def small_file(**options: Any) -> bytes:
    images = pa.array([{"bytes": png(value), "path": None} for value in range(20)], STRUCT)
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"image": images, "label": pa.array([value % 2 for value in range(20)])}), sink, **options
    )
    return sink.getvalue()


FILES = [small_file(), small_file(compression="zstd"), small_file(use_dictionary=False, compression="none")]


@fuzz(
    "data: damaged Parquet",
    quick=150,
    thorough=6_000,
    data=st.sampled_from(FILES).flatmap(damaged),
    skip=st.booleans(),
)
def test_fuzz_parquet_file_with_damage_is_ingested_or_explained(data: bytes, skip: bool) -> None:
    file = scratch_folder() / "damaged.parquet"
    file.write_bytes(data)
    outcome = ingested(file, on_bad_image="skip" if skip else "error")
    assert isinstance(outcome, list | DataError), repr(outcome)


@fuzz(
    "data: sources",
    quick=100,
    thorough=1_000,
    source=st.one_of(odd_texts, odd_texts.map(lambda text: f"torchvision:{text}")),
)
def test_fuzz_data_source_of_any_text_is_explained(source: str) -> None:
    path = os.path.expanduser(source.removeprefix("file://").partition("\0")[0])
    if os.path.isdir(path.encode(errors="replace")):  # of this machine: it may be large
        return
    outcome = documented(lambda: validate_config({"memory": {"budget_bytes": 1}, "data": {"source": source}}))
    if isinstance(outcome, NFError) or source.startswith("s3:"):
        return
    from nf_pipeline.data.sources import absolute_source, open_source

    documented(lambda: open_source(outcome.data))
    documented(lambda: absolute_source(outcome.data.source))
