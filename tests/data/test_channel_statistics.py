import numpy as np
import pytest

from nf_pipeline.data.channel_statistics import new_statistics
from nf_pipeline.samples import InputSpec


def statistics_of(samples, batch=7):
    statistics = new_statistics(InputSpec(shape=samples.shape[1:], dtype=samples.dtype.name))
    for start in range(0, len(samples), batch):
        statistics.add(samples[start : start + batch])
    return statistics


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 9), (4,), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_statistics_equal_numpys_over_all_batches(dtype, shape):
    random = np.random.default_rng(0)
    if dtype == "float32":
        samples = random.normal(1000, 3, (50, *shape)).astype(np.float32)
    else:
        samples = random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (50, *shape), dtype, endpoint=True)
    statistics = statistics_of(samples)

    axes = (0, *range(2, samples.ndim))
    np.testing.assert_allclose(statistics.mean(), samples.astype(np.float64).mean(axis=axes), rtol=1e-12)
    np.testing.assert_allclose(statistics.std(), samples.astype(np.float64).std(axis=axes), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_statistics_of_whole_numbers_are_the_same_in_any_order(dtype):
    samples = np.random.default_rng(1).integers(0, 200, (60, 2, 5)).astype(dtype)
    one, other = statistics_of(samples, 7), statistics_of(samples[::-1], 13)

    assert (one.mean(), one.std()) == (other.mean(), other.std())


def test_statistics_of_floats_are_the_same_in_the_same_order():
    samples = np.random.default_rng(1).normal(size=(60, 2, 5)).astype(np.float32)
    one, other = statistics_of(samples), statistics_of(samples)

    assert (one.mean(), one.std()) == (other.mean(), other.std())


@pytest.mark.parametrize("value", [9, 0.1, 1e-30, 3e38, 0])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_a_constant_channel_can_still_be_divided_by(dtype, value):
    statistics = statistics_of(np.full((29, 1, 3, 3), value if dtype == "float32" else 9, dtype))

    assert statistics.std() == (1.0,)


def test_a_small_spread_of_floats_is_kept():
    samples = np.random.default_rng(1).normal(0, 1e-20, (60, 1)).astype(np.float32)

    np.testing.assert_allclose(statistics_of(samples).std(), samples.astype(np.float64).std(), rtol=1e-10)


def test_tokens_have_no_statistics():
    assert new_statistics(InputSpec(shape=(4,), dtype="int32", num_tokens=9)) is None
