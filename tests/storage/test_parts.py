"""Parts of a split: nothing twice, nothing lost, and as many steps for everybody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.errors import InternalError
from nf_pipeline.storage.parts import Part, divide_rows, part_rows, step_sizes

ROWS = st.integers(0, 3000)
BATCH_SIZES = st.integers(1, 200)
COUNTS = st.integers(1, 9)


def parts_of(count):
    return [Part(index=index, count=count) for index in range(count)]


@given(num_rows=ROWS, count=COUNTS)
def test_parts_are_disjoint_cover_everything_and_differ_by_one_row_at_most(num_rows, count):
    rows = [row for part in parts_of(count) for row in part.rows(num_rows)]
    assert rows == list(range(num_rows))
    sizes = part_rows(num_rows, count)
    assert sizes == [len(part.rows(num_rows)) for part in parts_of(count)]
    assert max(sizes) - min(sizes) <= 1


@given(num_rows=ROWS, batch_size=BATCH_SIZES, count=COUNTS)
def test_even_batches_of_all_parts_step_together_and_none_is_empty(num_rows, batch_size, count):
    divided = [divide_rows(num_rows, batch_size, even=True, part=part) for part in parts_of(count)]
    assert len({len(sizes) for sizes in divided}) == 1
    for sizes, num_own in zip(divided, part_rows(num_rows, count), strict=True):
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        assert all(1 <= size <= batch_size for size in sizes)
        assert sizes == sorted(sizes, reverse=True)
        left_out = num_own - sum(sizes)
        allowed = batch_size == 1 or num_rows < count or (count == 1 and batch_size == 2)
        assert left_out == 0 or (left_out == 1 and allowed)


@given(num_rows=ROWS, batch_size=BATCH_SIZES, count=COUNTS)
def test_parts_take_as_many_steps_as_one_reader_with_the_effective_batch(num_rows, batch_size, count):
    steps = step_sizes(num_rows, batch_size, count)
    sizes = [divide_rows(num_rows, batch_size, even=True, part=part) for part in parts_of(count)]
    assert sum(steps) == sum(map(sum, sizes))
    if batch_size > 1 and num_rows >= count > 1:
        assert len(steps) == -(-num_rows // (batch_size * count))
        assert sum(steps) == num_rows


@given(num_rows=ROWS, batch_size=BATCH_SIZES, count=COUNTS)
def test_other_batches_of_a_part_take_all_its_rows(num_rows, batch_size, count):
    for part in parts_of(count):
        sizes = divide_rows(num_rows, batch_size, even=False, part=part)
        assert sum(sizes) == len(part.rows(num_rows))
        assert all(size == batch_size for size in sizes[:-1])


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "count", "expected"),
    [
        (10, 3, 2, [[3, 2], [3, 2]]),
        (11, 3, 2, [[3, 2], [3, 3]]),
        (9, 4, 2, [[2, 2], [3, 2]]),
        (5, 2, 2, [[1, 1], [2, 1]]),
        (5, 1, 2, [[1, 1], [1, 1]]),
        (7, 100, 3, [[2], [2], [3]]),
        (2, 4, 3, [[], [], []]),
    ],
)
def test_even_batches_of_parts(num_rows, batch_size, count, expected):
    assert [divide_rows(num_rows, batch_size, even=True, part=part) for part in parts_of(count)] == expected


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_cannot_be_is_refused(index, count):
    with pytest.raises(InternalError, match=f"got index {index} of {count}"):
        Part(index=index, count=count)
