import numpy as np
import pytest

from nf_pipeline.data.base import Undecodable
from nf_pipeline.data.tensors import MAX_TOKENS, stored_tensor, tensor_inputs
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("uint8", "uint8"),
        ("uint16", "uint16"),
        ("int8", "int16"),
        ("int16", "int16"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float32"),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_quantities_of_every_type_and_rank_keep_their_numbers(given, stored, shape):
    tensor = np.arange(np.prod(shape)).reshape(shape).astype(given)
    inputs = tensor_inputs(tensor, None)

    assert inputs == InputSpec(shape=shape, dtype=stored)
    kept = stored_tensor(tensor, inputs)
    assert kept.dtype == stored and np.array_equal(kept, tensor)


@pytest.mark.parametrize("given", ["int32", "int64", "uint32"])
def test_wide_whole_numbers_are_tokens(given):
    tensor = np.array([3, 0, 7], given)
    inputs = tensor_inputs(tensor, None)

    assert inputs == InputSpec(shape=(3,), dtype="int32", num_tokens=MAX_TOKENS)
    assert stored_tensor(tensor, inputs).tolist() == [3, 0, 7]


def test_given_number_of_tokens_makes_narrow_whole_numbers_tokens():
    tensor = np.array([3, 0, 7], np.uint16)
    inputs = tensor_inputs(tensor, 8)

    assert inputs == InputSpec(shape=(3,), dtype="int32", num_tokens=8)
    assert stored_tensor(tensor, inputs).dtype == np.int32


@pytest.mark.parametrize(
    ("tensor", "num_tokens", "text"),
    [
        (np.zeros((2, 3), np.int64), None, r"int64 of shape \(2, 3\) would be tokens"),
        (np.zeros(3, np.float32), 10, "data.num_tokens is 10, and the numbers are float32"),
        (np.zeros(3, bool), None, "numbers of type bool, want one of"),
        (
            np.zeros((6, 6, 5), np.uint8),
            None,
            r"uint8 of shape \(6, 6, 5\): .* could be last\nFix: transpose .* int16",
        ),
        (np.zeros(3, np.uint64), None, "numbers of type uint64, want one of"),
    ],
)
def test_tensor_that_cannot_be_stored_is_an_error(tensor, num_tokens, text):
    with pytest.raises(DataError, match=text):
        tensor_inputs(tensor, num_tokens)


@pytest.mark.parametrize("tensor", [np.zeros((3, 0), np.float32), np.array(1.0)], ids=["empty", "no-axis"])
def test_tensor_without_numbers_is_a_bad_sample(tensor):
    with pytest.raises(Undecodable, match="it holds no numbers"):
        tensor_inputs(tensor, None)


@pytest.mark.parametrize("token", [-1, 10, 2**40])
def test_token_out_of_range_is_named(token):
    with pytest.raises(DataError, match=f"token {token}, want 0 to 9"):
        stored_tensor(np.array([1, token, -7]), InputSpec(shape=(3,), dtype="int32", num_tokens=10))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_number_that_is_not_finite_is_a_bad_sample(number):
    with pytest.raises(Undecodable, match="NaN, or numbers that are infinite or too large"):
        stored_tensor(np.array([1.0, number]), InputSpec(shape=(2,), dtype="float32"))


def test_numbers_of_another_type_are_an_error():
    with pytest.raises(DataError, match="it holds float64, want int16"):
        stored_tensor(np.zeros(2), InputSpec(shape=(2,), dtype="int16"))
    with pytest.raises(DataError, match="it holds float64, want tokens"):
        stored_tensor(np.zeros(2), InputSpec(shape=(2,), dtype="int32", num_tokens=4))
