"""Cuts splits: stratified by class, decided by the seed and the labels alone.

Every class keeps at least one image in train; where there are no classes, all rows count as one. Knows nothing of
images, files or storage. Entry: `cut_splits` for all that a source brings, built on `assign_splits` for its train
split.
"""

from collections.abc import Mapping

import numpy as np

from nf_pipeline.data.base import SPLITS, Split
from nf_pipeline.errors import DataError

UNUSED = -1
TRAIN, VAL, TEST = range(len(SPLITS))


def cut_splits(
    labels: Mapping[Split, np.ndarray],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    max_train_images: int | None,
) -> dict[Split, np.ndarray]:
    """Decides where each row of each split that the data brings goes.

    A test split that the data brings is taken whole. What it does not bring is cut from its train split.
    `max_train_images` bounds train and validation together; the test split is never made smaller by it.

    Args:
        labels: int64 per split; "train" must be there.
        seed: same seed, same splits.
        val_fraction, test_fraction: see `assign_splits`; unused where the data brings the split.
        max_train_images: see `assign_splits`.

    Returns:
        int8 codes per split, indices into `SPLITS` or `UNUSED`, one for each row.
    """
    train_limit, val_limit = _share_limit(labels, max_train_images)
    codes: dict[Split, np.ndarray] = {
        "train": assign_splits(
            labels["train"],
            seed=seed,
            val_fraction=None if "val" in labels else val_fraction,
            test_fraction=None if "test" in labels else test_fraction,
            max_train_images=train_limit,
        )
    }
    if "val" in labels:
        codes["val"] = _subset(labels["val"], VAL, val_limit, seed)
    if "test" in labels:
        codes["test"] = np.full(len(labels["test"]), TEST, np.int8)
    return codes


def assign_splits(
    labels: np.ndarray,
    *,
    seed: int,
    val_fraction: float | None,
    test_fraction: float | None,
    max_train_images: int | None = None,
) -> np.ndarray:
    """Cuts a train split: first test from all of it, then the subset of the rest, then validation from that.

    Args:
        labels: int64 [N].
        seed: same seed, same splits.
        val_fraction: part of the (possibly subset) rest that becomes validation; None cuts none.
        test_fraction: part of all rows that becomes test; None cuts none.
        max_train_images: train and validation together; None takes all.

    Returns:
        int8 [N]: `TRAIN`, `VAL`, `TEST`, or `UNUSED` for rows outside the subset.

    Raises:
        DataError: a split would be empty, or the subset has no room for every class.

    Invariants:
        Every class has at least one row in train; sizes are the rounded fractions wherever classes allow;
        each class's share differs from the exact one by less than 1 where no bound holds it.
    """
    classes, label_of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    test = _part(counts, test_fraction, "test")
    pool = _pool(counts - test, max_train_images, cuts_val=val_fraction is not None)
    val = _part(pool, val_fraction, "val")
    rank = _rank_in_class(label_of_row, len(classes), seed)
    test, pool, val = test[label_of_row], pool[label_of_row], val[label_of_row]
    codes = np.full(len(labels), UNUSED, np.int8)
    codes[rank < test + pool] = TRAIN
    codes[rank < test + val] = VAL
    codes[rank < test] = TEST
    return codes


def apportion(counts: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Shares `total` among classes in proportion to `counts`, in whole numbers within bounds.

    Largest remainders, ties to the smaller class index; a total outside the bounds' sums is clamped.

    Args:
        counts: int64 [K], at least one positive.
        total: how many to share.
        low, high: int64 [K], 0 <= low <= high.

    Returns:
        int64 [K].
    """
    total = int(np.clip(total, low.sum(), high.sum()))
    exact = counts * total / counts.sum()
    shares = np.clip(np.floor(exact).astype(np.int64), low, high)
    while shares.sum() < total:
        shares[np.argmax(np.where(shares < high, exact - shares, -np.inf))] += 1
    while shares.sum() > total:
        shares[np.argmax(np.where(shares > low, shares - exact, -np.inf))] -= 1
    return shares


def _part(counts: np.ndarray, fraction: float | None, split: str) -> np.ndarray:
    if fraction is None:
        return np.zeros_like(counts)
    room = counts - 1
    if room.sum() < 1:
        raise DataError(
            f"split {split} is empty: {counts.sum()} images of {len(counts)} class(es) leave none to cut off",
            f"bring a {split} split or more images per class, or raise --max-train-images",
        )
    total = max(1, round(fraction * int(counts.sum())))
    return apportion(counts, total, np.zeros_like(counts), room)


def _pool(counts: np.ndarray, limit: int | None, *, cuts_val: bool) -> np.ndarray:
    if limit is None or limit >= counts.sum():
        return counts
    smallest = len(counts) + int(cuts_val)
    if limit < smallest:
        raise DataError(
            f"a subset of {limit} train images has no room for {len(counts)} classes in train"
            + (" and one image in val" if cuts_val else ""),
            "--max-train-images of at least a few images per class",
        )
    return apportion(counts, limit, np.ones_like(counts), counts)


def _rank_in_class(label_of_row: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    # A seeded order of all rows, then each row's position among the rows of its class in that order.
    order = np.random.default_rng([seed, 0]).permutation(len(label_of_row))
    by_class = order[np.argsort(label_of_row[order], kind="stable")]
    counts = np.bincount(label_of_row, minlength=num_classes)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(label_of_row), np.int64)
    rank[by_class] = np.arange(len(label_of_row)) - np.repeat(starts, counts)
    return rank


def _share_limit(labels: Mapping[Split, np.ndarray], limit: int | None) -> tuple[int | None, int | None]:
    # Train and validation images are subset in the proportion in which the data brings them.
    if limit is None or "val" not in labels:
        return limit, None
    sizes = np.array([len(labels["train"]), len(labels["val"])])
    if limit >= sizes.sum():
        return None, None
    train, val = apportion(sizes, limit, np.array([1, 1]), sizes)
    return int(train), int(val)


def _subset(labels: np.ndarray, code: int, limit: int | None, seed: int) -> np.ndarray:
    classes, label_of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = counts if limit is None else apportion(counts, limit, np.zeros_like(counts), counts)
    rank = _rank_in_class(label_of_row, len(classes), seed)
    return np.where(rank < quota[label_of_row], code, UNUSED).astype(np.int8)
