import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_pipeline.data.splits import TEST, TRAIN, UNUSED, VAL, apportion, assign_splits, cut_splits
from nf_pipeline.errors import DataError

label_lists = st.lists(st.integers(0, 4), min_size=8, max_size=200)


def cut(labels, **changed):
    settings_ = {"seed": 3, "val_fraction": 0.1, "test_fraction": 0.1, "max_train_images": None} | changed
    return assign_splits(np.asarray(labels), **settings_)


def sizes(codes):
    return {code: int((codes == code).sum()) for code in (TRAIN, VAL, TEST, UNUSED)}


def test_digits_sized_data_is_cut_to_the_rounded_fractions():
    codes = cut(np.arange(1797) % 10)

    assert sizes(codes) == {TRAIN: 1455, VAL: 162, TEST: 180, UNUSED: 0}


@settings(deadline=None)
@given(label_lists, st.integers(0, 5))
def test_every_class_keeps_a_train_image_and_splits_are_stratified(labels, seed):
    labels = np.asarray(labels)
    try:
        codes = cut(labels, seed=seed)
    except DataError:
        assert np.unique(labels, return_counts=True)[1].max() <= 2
        return
    classes, counts = np.unique(labels, return_counts=True)
    assert set(np.unique(labels[codes == TRAIN])) == set(classes)
    for kind, count in zip(classes, counts, strict=True):
        got = int(((codes == TEST) & (labels == kind)).sum())
        assert abs(got - count * 0.1) < 1 + 1e-9 or len(labels) < 10


@settings(deadline=None)
@given(label_lists, st.integers(2, 60))
def test_subset_bounds_train_and_val_together_and_leaves_test_alone(labels, limit):
    try:
        all_codes, codes = cut(labels), cut(labels, max_train_images=limit)
    except DataError:
        return
    used = (codes == TRAIN) | (codes == VAL)
    assert used.sum() == min(limit, ((all_codes == TRAIN) | (all_codes == VAL)).sum())
    np.testing.assert_array_equal(codes == TEST, all_codes == TEST)
    assert set(np.asarray(labels)[codes == TRAIN]) == set(labels)


def test_same_seed_gives_the_same_cut_and_another_seed_another():
    labels = np.arange(500) % 5

    np.testing.assert_array_equal(cut(labels), cut(labels))
    assert (cut(labels) != cut(labels, seed=4)).any()


def test_subset_with_fewer_images_than_classes_is_refused():
    with pytest.raises(DataError, match="a subset of 10 train images has no room for 10 classes"):
        cut(np.arange(1000) % 10, max_train_images=10)


def test_data_with_one_image_per_class_leaves_an_empty_split():
    with pytest.raises(DataError, match="split test is empty"):
        cut([0, 1, 2])


def test_a_test_split_that_the_data_brings_is_taken_whole_and_val_is_cut():
    labels = {"train": np.arange(100) % 4, "test": np.arange(40) % 4}

    codes = cut_splits(labels, seed=0, val_fraction=0.2, test_fraction=0.5, max_train_images=50)

    assert sizes(codes["train"]) == {TRAIN: 40, VAL: 10, TEST: 0, UNUSED: 50}
    assert (codes["test"] == TEST).all()


def test_a_val_split_that_the_data_brings_shares_the_subset_with_train():
    labels = {"train": np.arange(80) % 4, "val": np.arange(20) % 4, "test": np.arange(8) % 4}

    codes = cut_splits(labels, seed=0, val_fraction=0.2, test_fraction=0.5, max_train_images=50)

    assert sizes(codes["train"]) == {TRAIN: 40, VAL: 0, TEST: 0, UNUSED: 40}
    assert sizes(codes["val"]) == {TRAIN: 0, VAL: 10, TEST: 0, UNUSED: 10}
    assert np.bincount(labels["train"][codes["train"] == TRAIN]).tolist() == [10] * 4


def test_a_val_split_that_the_data_brings_is_taken_whole_without_a_limit():
    labels = {"train": np.arange(80) % 4, "val": np.arange(20) % 4}

    codes = cut_splits(labels, seed=0, val_fraction=0.2, test_fraction=0.25, max_train_images=None)

    assert (codes["val"] == VAL).all()
    assert sizes(codes["train"]) == {TRAIN: 60, VAL: 0, TEST: 20, UNUSED: 0}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=8),
    st.data(),
)
def test_apportioned_shares_meet_total_and_bounds(rows, data):
    counts = np.array([row[0] for row in rows])
    low = np.array([min(row[0], row[1]) for row in rows])
    high = np.maximum(low, np.array([min(row[0], row[2]) for row in rows]))
    total = data.draw(st.integers(0, int(counts.sum()) + 5))

    shares = apportion(counts, total, low, high)

    assert shares.sum() == np.clip(total, low.sum(), high.sum())
    assert ((low <= shares) & (shares <= high)).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_apportioned_shares_without_bounds_are_within_one_of_exact(counts, part):
    counts = np.array(counts)
    total = int(counts.sum() * part)

    shares = apportion(counts, total, np.zeros_like(counts), counts)

    assert (abs(shares - counts * total / counts.sum()) < 1).all()
