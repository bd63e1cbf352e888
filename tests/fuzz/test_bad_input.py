"""What the fuzz tests found, each as a test of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import RUN, SmallRun, make_run, sample_manifest, small_plan
from test_fuzz_user_data import STRUCT, ingested, png
from test_fuzz_weights import CARD

from nf_pipeline.cli import main
from nf_pipeline.config import resolve_config, validate_config
from nf_pipeline.core.chance import wilson_interval
from nf_pipeline.data.columns import class_names_of
from nf_pipeline.data.labels import LabelColumn
from nf_pipeline.data.ray_tensors import ray_tensor_of
from nf_pipeline.documents import parse_json
from nf_pipeline.driver.run_record import load_run
from nf_pipeline.errors import ConfigError, DataError, ObjectCorrupt, StorageError
from nf_pipeline.model_files import ModelCard
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.published import Announcements, Source
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.store import check_key, open_store
from nf_pipeline.units import parse_bytes

BUDGET = {"memory.budget_bytes": "1MiB"}
MANY_DIGITS = "9" * 5000


def shortly(value: Any) -> str:
    """Names a case in the list of tests."""
    return ascii(value)[:20]


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return make_run(tmp_path / "store")


@pytest.mark.parametrize(
    "text", ["9999999999999999TiB", str(2**63), MANY_DIGITS, "9" * 400 + ".5", "8388608TiB"], ids=shortly
)
def test_byte_count_beyond_63_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="want"):
        parse_bytes(text)
    with pytest.raises(ConfigError, match="budget_bytes"):
        resolve_config(flags={"memory.budget_bytes": text})


@pytest.mark.parametrize("number", [2**63, 10**4000, -1, 0, True, 1.5e300, float("nan"), float("inf")], ids=shortly)
def test_number_that_is_no_byte_count_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="want"):
        parse_bytes(number)


def test_largest_byte_count_is_accepted() -> None:
    assert parse_bytes(str(2**63 - 1)) == parse_bytes(2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize("field", ["run", "train.seed", "train.lr", "data.source", "nothing"])
def test_assignment_of_thousands_of_digits_or_brackets_is_explained(field: str) -> None:
    for value in (MANY_DIGITS, "[" * 20_000, "{a=" * 20_000):
        try:
            resolve_config(assignments=[f"{field}={value}"], flags=BUDGET)
        except ConfigError as error:
            assert error.fix and len(str(error)) < 4000


@pytest.mark.parametrize(
    "text", [f'{{"train": {{"seed": {MANY_DIGITS}}}}}', "[" * 50_000, '{"a":' * 10_000, "\ud800"], ids=shortly
)
def test_json_config_that_python_cannot_hold_is_explained(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=r"run\.json"):
        resolve_config(file=file)


@pytest.mark.parametrize(
    "text", [f"[train]\nseed = {MANY_DIGITS}", "x = " + "[" * 50_000, "a = 1\na = 2", "x = '\0'"], ids=shortly
)
def test_toml_config_that_python_cannot_hold_is_explained(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        resolve_config(file=file)


def test_confidence_too_close_to_one_to_compute_with_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"exits\.confidence"):
        resolve_config(assignments=["exits.confidence=0.9999999999999999"], flags=BUDGET)
    highest = resolve_config(assignments=["exits.confidence=0.999999"], flags=BUDGET).exits.confidence
    assert wilson_interval(5, 10, highest)[1] < 1


@pytest.mark.parametrize("field", ["cluster.placement_timeout_s", "train.warmup_epochs"])
def test_time_that_no_clock_can_wait_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        resolve_config(assignments=[f"{field}=1e300"], flags=BUDGET)


def test_store_and_keys_that_are_no_file_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="no folder"):
        open_store("\ud800")
    for key in ("\ud800", "a\0b", "run/../x"):
        with pytest.raises(StorageError):
            check_key(key)


def write(path: Path, arrays: dict[str, pa.Array] | list[tuple[str, pa.Array]], **options: Any) -> Path:
    pairs = arrays if isinstance(arrays, list) else list(arrays.items())
    pq.write_table(pa.table([array for _, array in pairs], names=[name for name, _ in pairs]), path, **options)
    return path


def images(num: int = 20) -> pa.Array:
    return pa.array([{"bytes": png(idx), "path": None} for idx in range(num)], STRUCT)


def labels(num: int = 20) -> pa.Array:
    return pa.array([idx % 2 for idx in range(num)])


@pytest.mark.parametrize("twice", ["image", "label"])
def test_columns_of_the_same_name_are_an_error(twice: str, tmp_path: Path) -> None:
    arrays = [("image", images()), ("label", labels()), (twice, {"image": images(), "label": labels()}[twice])]
    outcome = ingested(write(tmp_path / "x.parquet", arrays))
    assert isinstance(outcome, DataError) and f"2 columns are called '{twice}'" in str(outcome)


def test_column_whose_name_begins_like_the_image_column_is_left_alone(tmp_path: Path) -> None:
    arrays = [("image.bytes", pa.array(range(20))), ("image", images()), ("label.x", labels()), ("label", labels())]
    assert isinstance(ingested(write(tmp_path / "x.parquet", arrays)), list)


def test_text_labels_that_are_no_utf8_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"image": images(), "label": pa.array(["qqqq", "wwww"] * 10)})
    file.write_bytes(file.read_bytes().replace(b"qqqq", b"\xff\xfe\xff\xfe"))
    outcome = ingested(file)
    assert isinstance(outcome, DataError) and "x.parquet" in str(outcome)


def test_class_name_of_a_whole_text_is_refused(tmp_path: Path) -> None:
    outcome = ingested(write(tmp_path / "x.parquet", {"image": images(), "label": pa.array(["a" * 5000, "b"] * 10)}))
    assert isinstance(outcome, DataError) and "5000 characters" in str(outcome)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_labels_of_every_arrow_type_are_ingested(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array(["a", "b"] * 10, pa.string()).cast(kind)
    assert isinstance(ingested(write(tmp_path / "x.parquet", {"image": images(), "label": column})), list)


def test_null_in_a_dictionary_of_labels_is_a_null_label() -> None:
    column = pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array([7, None]))])
    with pytest.raises(DataError, match="row 1: label is null"):
        LabelColumn.of(column, lambda row: f"row {row}")


@pytest.mark.parametrize(
    "names", ['["a", "\\ud800"]', "[" * 5000, '"ab"', "[1, 2]", "{}", "[]", f"[{MANY_DIGITS}]"], ids=shortly
)
def test_class_names_in_metadata_that_are_no_texts_are_ignored(names: str) -> None:
    text = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
    schema = pa.schema([pa.field("label", pa.int64())], metadata={b"huggingface": text.encode()})
    assert class_names_of(schema, "label") is None


def ray_tensors(shape: list[int | None], values: list[int]) -> list[Any]:
    kind = pa.struct([("data", pa.list_(pa.uint8())), ("shape", pa.list_(pa.int64()))])
    name = {b"ARROW:extension:name": b"ray.data.arrow_variable_shaped_tensor"}
    tensor = ray_tensor_of(pa.field("image", kind, metadata=name))
    return list(tensor.cells(pa.array([{"data": values, "shape": shape}], kind)))


@pytest.mark.parametrize("shape", [[2, 3], [-1, -4], [None, 4], [2**40, 2**40], [2**62, 4, 0]])
def test_ray_tensor_whose_values_do_not_fill_its_shape_is_no_image(shape: list[int | None]) -> None:
    assert ray_tensors(shape, [1, 2, 3, 4]) == [None]
    assert ray_tensors([2, 2], [1, 2, 3, 4])[0].shape == (2, 2)


@pytest.mark.parametrize("kind", [pa.struct([("data", pa.int64())]), pa.struct([("data", pa.list_(pa.uint8()))])])
def test_ray_tensor_column_without_its_parts_is_no_tensor_column(kind: pa.DataType) -> None:
    name = {b"ARROW:extension:name": b"ray.data.arrow_variable_shaped_tensor"}
    assert ray_tensor_of(pa.field("image", kind, metadata=name)) is None


def test_more_rows_than_bytes_are_refused_before_their_labels_are_read(tmp_path: Path) -> None:
    num = 2**20 + 1
    file = write(tmp_path / "x.parquet", {"image": pa.nulls(num, STRUCT), "label": pa.array(np.zeros(num, np.int64))})
    outcome = ingested(file)
    assert isinstance(outcome, DataError) and f"{num} rows in a file of" in str(outcome)


def test_data_source_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.source"):
        validate_config({"memory": {"budget_bytes": 1}, "data": {"source": ""}})


PLAN_FAULTS = {
    "no blocks": ("blocks", []),
    "no layers": ("layers", []),
    "text for a number": ("target", {"size": "10"}),
    "negative": ("budget_bytes", -1),
    "beyond 63 bits": ("params_full", 2**70),
    "wrong channels": ("inputs", {"shape": [1, 0, 4]}),
    "null": ("units", None),
    "unknown": ("colour", 1),
}


@pytest.mark.parametrize("fault", sorted(PLAN_FAULTS))
def test_plan_with_a_fault_is_refused_where_it_is_read(fault: str) -> None:
    field, value = PLAN_FAULTS[fault]
    document = json.loads(json.dumps(small_plan().to_json())) | {field: value}
    with pytest.raises(ValueError, match=r"\w+: "):
        Plan.from_json(document)


@pytest.mark.parametrize(
    "units", [[[0, 1], [0, 2]], [[0, 1]], [[0, 1], [1, 2], [5, 2]], [[0, 0], [0, 2]], [[1, 2], [0, 1]]]
)
def test_plan_whose_blocks_do_not_cover_the_units_in_order_is_refused(units: list[list[int]]) -> None:
    document = json.loads(json.dumps(small_plan().to_json()))
    document["blocks"] = [{**document["blocks"][0], "units": part} for part in units]
    with pytest.raises(ValueError, match="do not cover 2 parts"):
        Plan.from_json(document)


@pytest.mark.parametrize(
    "line",
    [
        b"1",
        b"[]",
        b'{"event": "StageStarted"}',
        b'{"event": "EpochDone", "stage": "block-000", "losses": 3}',
        b"[" * 9000,
    ],
    ids=shortly,
)
def test_status_of_a_run_whose_log_has_no_event_in_a_line_names_the_line(
    line: bytes, run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write("events.jsonl", json.dumps(run.events[0]).encode() + b"\n" + line + b"\n")
    assert main(["status", run.uri]) == 4
    assert "line 2 is no event" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["storage", "cluster", "data", "train"])
def test_run_record_whose_section_is_no_object_is_damaged(section: str, run: SmallRun) -> None:
    run.write("run.json", seal({**run.record, "config": {**run.record["config"], section: 5}}))
    with pytest.raises(ObjectCorrupt, match="holds no configuration"):
        load_run(run.uri)


def test_manifest_that_lacks_a_fact_is_damaged_not_a_key_error() -> None:
    manifest = StageManifest.from_json(sample_manifest())
    with pytest.raises(ObjectCorrupt, match=r"facts\.absent: missing"):
        manifest.facts["absent"]


@pytest.mark.parametrize(
    "facts",
    [
        {"target": {"size": 0}},
        {"num_val": 0},
        {"val_errors": [0.5]},
        {"inputs": {"shape": [1, "2"]}},
        {"val_correct": [None]},
    ],
)
def test_manifest_with_a_fact_of_another_type_is_damaged(facts: dict[str, Any]) -> None:
    with pytest.raises(ObjectCorrupt, match=r"facts\."):
        StageManifest.from_json({**sample_manifest(), "facts": facts})


def test_manifest_with_a_number_below_zero_is_damaged() -> None:
    document = sample_manifest()
    document["weights"]["num_bytes"] = -1
    with pytest.raises(ObjectCorrupt, match="want 0 or more"):
        StageManifest.from_json(document)


@pytest.mark.parametrize("shards", [{"x": {}}, {"0": {"key": 1}}, {"0": 5}, 5, None])
def test_publication_with_a_wrong_shard_is_an_error_that_names_it(shards: Any, run: SmallRun) -> None:
    key = RunLayout(RUN).publication(0, 0, 0)
    (run.folder / key).parent.mkdir(parents=True)
    (run.folder / key).write_text(json.dumps({"attempt": "a", "shards": shards}))
    source = Source(manifest_key=RunLayout(RUN).block_manifest(0), publication_keys=(key,))
    with pytest.raises(ObjectCorrupt, match="publishing"):
        Announcements(open_store(str(run.folder)), source).poll()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", {"size": 2**40}),
        ("target", {**CARD["target"], "kind": "values"}),
        ("target", {**CARD["target"], "mean": [0.0, 0.0], "std": [1.0, 1.0]}),
        ("inputs", {**CARD["inputs"], "std": [0.0]}),
        ("inputs", {**CARD["inputs"], "shape": [1, 2**20, 2**20]}),
        ("num_layers", 0),
        ("contexts", [0]),
        ("contexts", [CARD["num_layers"]]),
        ("contexts", [1, 1]),
        ("contexts", [-1]),
    ],
)
def test_model_card_that_asks_for_more_than_it_describes_is_damaged(field: str, value: Any) -> None:
    with pytest.raises(ObjectCorrupt, match=field):
        ModelCard.from_json({**CARD, field: value}, "model.json")


def test_json_document_that_python_cannot_hold_is_a_value_error() -> None:
    for data in (b"[" * 100_000, MANY_DIGITS.encode(), str(2**63).encode(), b"\xff", b""):
        with pytest.raises(ValueError, match=r"."):
            parse_json(data)
