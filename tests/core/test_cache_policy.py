"""Sources of blocks: prices computed by hand, and choices against all that there are."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_pipeline.core.cache_policy import BlockCost, CacheJob, choose_sources, forced_sources
from nf_pipeline.plans import StoreRates


def make_job(blocks: list[tuple[float, float, int]], **changes: object) -> CacheJob:
    """Makes a job from (train_s, forward_s, stored_bytes) per block, of 10 rows and 4 epochs."""
    given_ = {
        "blocks": tuple(BlockCost(train_s=t, forward_s=f, stored_bytes=n) for t, f, n in blocks),
        "image_bytes": 100,
        "rows": 10,
        "stored_rows": 10,
        "epochs": 4,
        "rates": StoreRates(read_bytes_per_s=1000.0, write_bytes_per_s=500.0),
        "shares_cores": False,
    }
    return CacheJob(**{**given_, **changes})


def fits_all(block_idx: int, source: int) -> bool:
    return True


# Images are read in 0.1 s a sample. Block 0: 3 s to train, 1 s forward, 4,000 bytes: 4 s to read, 8 s to write.
TWO = [(3.0, 1.0, 4000), (2.0, 0.5, 0)]


def test_training_from_the_block_before_waits_for_the_slower_of_store_and_device() -> None:
    job = make_job(TWO)
    assert job.train_s(0, -1) == pytest.approx(10 * 4 * 3.0)  # the device: 3 s against 0.1 s of reading
    assert job.train_s(1, 0) == pytest.approx(10 * 4 * 4.0)  # the store: 4 s against 2 s of training
    assert job.read_s(0) == pytest.approx(10 * 4.0)


def test_training_from_an_earlier_source_adds_the_layers_between_to_every_step() -> None:
    job = make_job(TWO)
    assert job.train_s(1, -1) == pytest.approx(10 * 4 * (2.0 + 1.0))
    assert job.recompute_s(1, -1) == pytest.approx(10 * 1.0)


def test_storing_costs_one_pass_and_the_writing() -> None:
    assert make_job(TWO).store_s(0, -1) == pytest.approx(10 * (1.0 + 8.0))


def test_changing_images_takes_seconds_only_where_a_block_starts_from_them() -> None:
    changing = {"change_s": 2.0, "changed": (0.5, 0.25)}
    beside = make_job(TWO, **changing)  # on cores of their own, in less than the 3 s of a step
    assert beside.train_s(0, -1) == make_job(TWO).train_s(0, -1)
    assert make_job(TWO, change_s=20.0, changed=(0.5, 0.25)).train_s(0, -1) == pytest.approx(10 * 4 * 10.0)
    shared = make_job(TWO, shares_cores=True, **changing)
    assert shared.train_s(0, -1) == pytest.approx(10 * 4 * (3.0 + 1.0))
    assert shared.train_s(1, 0) == make_job(TWO, shares_cores=True).train_s(1, 0)
    assert shared.store_s(0, -1) == pytest.approx(10 * (1.0 + 0.5 + 8.0))


def test_blocks_are_stored_where_changing_their_images_anew_would_take_longer() -> None:
    fast = {"rates": StoreRates(read_bytes_per_s=1e6, write_bytes_per_s=1000.0), "shares_cores": True}
    assert choose_sources(make_job(TWO, **fast), fits_all) == (-1, -1)
    slow_changes = {"change_s": 5.0, "changed": (1.0, 0.0)}
    assert choose_sources(make_job(TWO, **fast, **slow_changes), fits_all) == (-1, 0)


def test_storing_takes_every_view_and_an_epoch_reads_one() -> None:
    four_views = make_job(TWO, stored_rows=31)  # 7 samples to train on, 3 to validate
    assert four_views.store_s(0, -1) == pytest.approx(31 * (1.0 + 8.0))
    assert four_views.train_s(1, 0) == make_job(TWO).train_s(1, 0)
    fast = {"rates": StoreRates(read_bytes_per_s=1e6, write_bytes_per_s=2000.0), "epochs": 10}
    assert choose_sources(make_job(TWO, **fast), fits_all) == (-1, 0)
    assert choose_sources(make_job(TWO, stored_rows=61, **fast), fits_all) == (-1, -1)


def test_reading_takes_cores_from_training_only_where_they_are_the_same() -> None:
    rates = StoreRates(read_bytes_per_s=1000.0, write_bytes_per_s=500.0, read_cpu_s_per_byte=0.001)
    assert make_job(TWO, rates=rates).train_s(0, -1) == pytest.approx(10 * 4 * 3.0)
    assert make_job(TWO, rates=rates, shares_cores=True).train_s(0, -1) == pytest.approx(10 * 4 * (3.0 + 0.1))


def test_total_counts_the_storing_of_what_is_read_and_of_nothing_else() -> None:
    job = make_job(TWO)
    assert job.total_s((-1, 0)) == pytest.approx(120 + 160 + 90)
    assert job.total_s((-1, -1)) == pytest.approx(120 + 120)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({}, (-1, -1), id="a slow store"),
        pytest.param({"rates": StoreRates(read_bytes_per_s=1e6, write_bytes_per_s=1e6)}, (-1, 0), id="a fast store"),
        pytest.param(
            {"rates": StoreRates(read_bytes_per_s=1e6, write_bytes_per_s=2000.0), "epochs": 1},
            (-1, -1),
            id="too few epochs to repay the writing",
        ),
        pytest.param(
            {"rates": StoreRates(read_bytes_per_s=1e6, write_bytes_per_s=2000.0), "epochs": 10},
            (-1, 0),
            id="epochs enough",
        ),
    ],
)
def test_cheaper_way_is_chosen(changes: dict[str, object], wanted: tuple[int, ...]) -> None:
    assert choose_sources(make_job(TWO, **changes), fits_all) == wanted


def test_one_small_cut_in_the_middle_serves_all_later_blocks() -> None:
    # Block 1 ends in few bytes after much work; blocks 0 and 2 in many.
    blocks = [(1.0, 1.0, 10**6), (1.0, 5.0, 10), (1.0, 0.01, 10**6), (1.0, 0.01, 10**6), (1.0, 1.0, 0)]
    assert choose_sources(make_job(blocks), fits_all) == (-1, -1, 1, 1, 1)


def test_block_beside_which_nothing_fits_reads_what_the_block_before_stores() -> None:
    job = make_job([TWO[0], (2.0, 0.5, 4000), (2.0, 0.5, 0)])
    assert choose_sources(job, fits_all) == (-1, -1, -1)
    assert choose_sources(job, lambda block_idx, source: block_idx != 1) == (-1, 0, -1)


def test_forced_modes_store_everything_or_start_as_early_as_fits() -> None:
    assert forced_sources(4, "shards", fits_all) == (-1, 0, 1, 2)
    assert forced_sources(4, "recompute", fits_all) == (-1, -1, -1, -1)
    assert forced_sources(4, "recompute", lambda block_idx, source: source >= block_idx - 2) == (-1, -1, 0, 1)
    assert forced_sources(3, "recompute", lambda block_idx, source: False) == (-1, 0, 1)


def all_sources(num_blocks: int, fitting: frozenset[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Yields every choice that fits."""
    options = [[s for s in range(-1, j) if s == j - 1 or (j, s) in fitting] for j in range(num_blocks)]
    yield from itertools.product(*options)


seconds = st.floats(0.0, 10.0).map(lambda value: round(value, 2))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(seconds, seconds, st.integers(1, 10_000)), min_size=1, max_size=6),
    st.frozensets(st.tuples(st.integers(1, 5), st.integers(-1, 4))),
    st.integers(1, 5),
    st.booleans(),
)
def test_choice_is_as_cheap_as_the_cheapest_of_all(
    blocks: list[tuple[float, float, int]], fitting: frozenset[tuple[int, int]], epochs: int, shares_cores: bool
) -> None:
    rates = StoreRates(read_bytes_per_s=1000.0, write_bytes_per_s=500.0, read_cpu_s_per_byte=0.0005)
    job = make_job(blocks, epochs=epochs, rates=rates, shares_cores=shares_cores)
    chosen = choose_sources(job, lambda block_idx, source: (block_idx, source) in fitting)
    cheapest = min(job.total_s(sources) for sources in all_sources(len(blocks), fitting))
    assert chosen in set(all_sources(len(blocks), fitting))
    assert job.total_s(chosen) == pytest.approx(cheapest)


def test_hundred_blocks_are_decided_at_once() -> None:
    blocks = [(1.0, 0.3 * (idx % 7), 500 * (1 + idx * 37 % 11)) for idx in range(100)]
    sources = choose_sources(make_job(blocks), lambda block_idx, source: block_idx - source < 6)
    assert len(sources) == 100
    assert make_job(blocks).total_s(sources) <= make_job(blocks).total_s(forced_sources(100, "shards", fits_all))
