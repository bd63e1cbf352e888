import json
import math

import numpy as np
import pyarrow as pa
import pytest

from nf_pipeline.data.base import Unusable
from nf_pipeline.data.columns import class_names_of, find_image_column, find_label_column, image_cells
from nf_pipeline.data.tensors import is_image
from nf_pipeline.errors import DataError
from nf_pipeline.storage.shards import TensorSpec, shard_schema

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HWC = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def cells(array, field=None):
    return list(image_cells(field or pa.field("image", array.type))(array))


def test_image_column_is_found_by_type_whatever_its_name():
    schema = pa.schema([("label", pa.int64()), ("photo", STRUCT), ("caption", pa.string())])

    assert find_image_column(schema, None, "f") == "photo"


def test_a_struct_is_preferred_to_plain_bytes():
    schema = pa.schema([("thumbnail", pa.binary()), ("photo", STRUCT)])

    assert find_image_column(schema, None, "f") == "photo"


def test_of_two_candidates_the_one_with_an_images_name_is_taken():
    schema = pa.schema([("mask", pa.binary()), ("img", pa.binary())])

    assert find_image_column(schema, None, "f") == "img"


def test_two_equal_candidates_are_an_error_that_names_both():
    schema = pa.schema([("left", pa.binary()), ("right", pa.binary())])

    with pytest.raises(DataError, match=r"a.parquet: columns \['left', 'right'\] could all be the image") as caught:
        find_image_column(schema, None, "a.parquet")
    assert "--set data.image_column=NAME, or --image-column NAME" in str(caught.value)


def test_no_image_column_is_an_error_that_lists_what_there_is():
    schema = pa.schema([("x", pa.float32()), ("label", pa.int64())])

    with pytest.raises(DataError, match=r"a.parquet: no column holds images; it has 'x' \(float\), 'label'"):
        find_image_column(schema, None, "a.parquet")


def test_a_given_column_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"a.parquet: missing column 'picture'; it has 'label'"):
        find_image_column(pa.schema([("label", pa.int64())]), "picture", "a.parquet")


def test_a_given_column_of_another_type_is_refused():
    with pytest.raises(DataError, match=r"column 'label': type int64 holds no images"):
        find_image_column(pa.schema([("label", pa.int64())]), "label", "a.parquet")


@pytest.mark.parametrize("name", ["label", "labels", "target", "class", "Label"])
def test_label_column_is_found_by_name(name):
    assert find_label_column(pa.schema([("id", pa.int64()), (name, pa.int32())]), None, "f") == name


def test_missing_label_column_is_an_error_that_lists_what_there_is():
    schema = pa.schema([("image", STRUCT), ("fine_label", pa.int64())])

    with pytest.raises(DataError, match=r"a.parquet: no label column.*'fine_label' \(int64\)") as caught:
        find_label_column(schema, None, "a.parquet")
    assert "--set data.label_column=NAME, or --label-column NAME" in str(caught.value)


def test_given_label_column_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"a.parquet: missing column 'kind'"):
        find_label_column(pa.schema([("label", pa.int64())]), "kind", "a.parquet")


@pytest.mark.parametrize(
    "kind", [pa.bool_(), pa.list_(pa.list_(pa.float32())), pa.timestamp("s"), pa.binary()], ids=str
)
def test_label_column_of_neither_numbers_nor_text_is_refused(kind):
    with pytest.raises(DataError, match=r"a.parquet, column 'label': type .*, want whole numbers, text, or values"):
        find_label_column(pa.schema([("label", kind)]), None, "a.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        pa.float32(),
        pa.float64(),
        pa.list_(pa.float32()),
        pa.list_(pa.int64(), 3),
        pa.fixed_shape_tensor(pa.int8(), [2]),
    ],
    ids=str,
)
def test_label_column_of_numbers_or_lists_of_them_is_found(kind):
    assert find_label_column(pa.schema([("target", kind)]), None, "a.parquet") == "target"


def test_struct_and_plain_bytes_give_the_bytes_and_name_what_is_missing():
    struct = pa.array([{"bytes": b"a", "path": "p"}, None, {"bytes": None, "path": "p"}, {"bytes": b"", "path": ""}])
    nulls = [Unusable("it is null"), Unusable("it is null"), Unusable("it has no bytes")]

    assert cells(pa.array(struct.to_pylist(), STRUCT)) == [b"a", *nulls]
    assert cells(pa.array([b"a", None])) == [b"a", Unusable("it is null")]


@pytest.mark.parametrize("tensor", [HWC, HWC[:, :, 0], HWC.transpose(2, 0, 1)[:, :2, :2].repeat(3, axis=2)])
def test_fixed_shape_tensors_give_pixels_in_rows(tensor):
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([tensor, tensor]))

    pixels, _ = cells(array)

    expected = tensor if tensor.shape[-1] == 3 else tensor.transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, expected)


def test_fixed_shape_tensors_with_a_permutation_give_the_logical_order():
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([HWC, HWC]).transpose(0, 2, 1, 3))

    np.testing.assert_array_equal(cells(array)[1], HWC.transpose(1, 0, 2))


def test_null_tensors_are_named():
    kind = pa.fixed_shape_tensor(pa.uint8(), [1, 2])
    array = pa.ExtensionArray.from_storage(kind, pa.array([[1, 2], None, [1, None]], pa.list_(pa.uint8(), 2)))

    pixels, *nulls = cells(array)

    assert pixels.tolist() == [[1, 2]]
    assert nulls == [Unusable("it is null")] * 2


def test_nested_lists_give_pixels():
    array = pa.array([HWC.tolist(), HWC.tolist()], pa.list_(pa.list_(pa.list_(pa.uint8()))))

    np.testing.assert_array_equal(cells(array)[1], HWC)


def test_nested_lists_that_are_no_tensor_say_why():
    kind = pa.list_(pa.list_(pa.uint8()))
    array = pa.array([[[1, 2], [3]], None, [[1], None], [[1], [None]], [], [[1, 2]]], kind)

    reasons = [cell.reason if isinstance(cell, Unusable) else cell.tolist() for cell in cells(array)]

    assert reasons == [
        "its rows have different lengths",
        "it is null",
        "it has a null inside",
        "it has a null inside",
        "its rows have different lengths",
        [[1, 2]],
    ]


def test_lists_of_what_is_no_number_hold_no_images():
    with pytest.raises(DataError, match="no column holds images"):
        find_image_column(pa.schema([("image", pa.list_(pa.list_(pa.string())))]), None, "f")


TOKENS = ("input_ids", pa.list_(pa.int64()))
FEATURES = ("features", pa.fixed_shape_tensor(pa.float32(), [3, 4]))


@pytest.mark.parametrize(
    ("columns", "want"),
    [
        ([TOKENS, ("attention_mask", pa.list_(pa.int64())), ("label", pa.int64())], "input_ids"),
        ([FEATURES, TOKENS], "input_ids"),
        ([FEATURES, ("label", pa.list_(pa.float32()))], "features"),
        ([FEATURES, ("picture", pa.binary())], "picture"),
        ([("boxes", pa.list_(pa.float64())), ("picture", STRUCT)], "picture"),
        ([("label", pa.list_(pa.float32()))], "label"),
    ],
    ids=["tokens", "names", "labels-aside", "binary-first", "struct-first", "only-labels"],
)
def test_tensor_column_is_found_where_no_column_can_only_be_images(columns, want):
    assert find_image_column(pa.schema(columns), None, "f") == want


def test_given_label_column_is_not_taken_for_the_input():
    schema = pa.schema([("state", pa.list_(pa.float32())), ("action", pa.list_(pa.float32()))])

    assert find_image_column(schema, None, "f", "action") == "state"
    with pytest.raises(DataError, match=r"columns \['action', 'state'\] could all be the image"):
        find_image_column(schema, None, "f")


def test_our_own_shards_are_read_as_images():
    field = shard_schema(TensorSpec("uint8", (3, 2, 3))).field("tensor")
    chw = HWC.transpose(2, 0, 1)

    assert find_image_column(pa.schema([field]), None, "f") == "tensor"
    np.testing.assert_array_equal(cells(pa.array([chw.tobytes()], field.type), field)[0], HWC)


@pytest.mark.parametrize("shape", [(5, 6, 6), (6, 6, 5), (2, 4, 7), (16, 1, 5), (7, 2, 2)], ids=str)
def test_bytes_that_cannot_be_pixels_are_tensors_as_they_are(shape):
    tensor = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    cell, _ = cells(pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([tensor, tensor])))

    np.testing.assert_array_equal(cell, tensor)
    assert not is_image(cell)


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 6, 5), (4, 9, 9), (5, 6, 3), (3, 3, 3), (6, 5)], ids=str)
def test_bytes_that_can_be_pixels_are_pixels(shape):
    (cell,) = cells(pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, *shape), np.uint8)))

    assert is_image(cell)


@pytest.mark.parametrize("shape", [(9, 5, 3), (16, 4, 4)], ids=str)
def test_our_own_shards_of_many_channels_are_never_taken_for_pixels(shape):
    field = shard_schema(TensorSpec("uint8", shape)).field("tensor")
    (cell,) = cells(pa.array([bytes(math.prod(shape))], field.type), field)

    assert cell == Unusable(f"uint8 of shape {shape}, channels first, would be taken for pixels")


def test_class_names_come_from_hugging_face_metadata():
    features = {"info": {"features": {"kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    schema = pa.schema([("kind", pa.int64())], {"huggingface": json.dumps(features)})

    assert class_names_of(schema, "kind") == ("cat", "dog")


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"info": 3}', '{"info": {"features": {"label": {"names": [1]}}}}']
)
def test_unfit_metadata_gives_no_class_names(text):
    assert class_names_of(pa.schema([("label", pa.int64())], {"huggingface": text}), "label") is None
