"""Batches: every row once, the same whatever the timing, bounded memory, and a clean end."""

import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, StorageError
from nf_pipeline.storage import reader as reader_module
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.reader import ShardReader, divide_rows
from nf_pipeline.storage.store import open_store


class SlowStore(LocalStore):
    """A folder store whose reads wait for `gate`, and take a time that differs from key to key."""

    def __init__(self, root, delays_s=()):
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.reads = []
        self._delays_s = list(delays_s)

    def get(self, key):
        self.gate.wait(30)
        self.reads.append(key)
        if self._delays_s:
            time.sleep(self._delays_s[len(self.reads) % len(self._delays_s)])
        return super().get(key)


def read_all(reader, **options):
    defaults = {"seed": 0, "epoch": 0, "shuffle": True}
    return list(reader.batches(**{**defaults, **options}))


def ids_of(batches):
    return [batch.sample_ids.tolist() for batch in batches]


def live_reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(0, 60),
    rows_per_shard=st.integers(1, 13),
    batch_size=st.integers(1, 70),
    window_shards=st.integers(1, 5),
    shuffle=st.booleans(),
    even=st.booleans(),
)
def test_every_row_comes_exactly_once_with_its_own_label(
    write, num_rows, rows_per_shard, batch_size, window_shards, shuffle, even
):
    written = write(num_rows, rows_per_shard=rows_per_shard)
    reader = ShardReader(
        written.store, written.shards, written.spec, batch_size=batch_size, window_shards=window_shards
    )
    batches = read_all(reader, shuffle=shuffle, even=even)
    row_of = {sample_id: row for row, sample_id in enumerate(written.sample_ids.tolist())}
    rows = [row_of[sample_id] for batch in batches for sample_id in batch.sample_ids.tolist()]
    sizes = divide_rows(num_rows, batch_size, even=even)
    assert [len(batch.labels) for batch in batches] == sizes
    assert len(batches) == reader.num_batches(even=even)
    assert len(rows) == len(set(rows)) == sum(sizes)
    if not shuffle:
        assert rows == list(range(sum(sizes)))
    for batch in batches:
        chosen = [row_of[sample_id] for sample_id in batch.sample_ids.tolist()]
        assert np.array_equal(batch.tensors, written.tensors[chosen])
        assert np.array_equal(batch.labels, written.labels[chosen])


@given(num_rows=st.integers(0, 5000), batch_size=st.integers(1, 300))
def test_even_batches_take_every_row_and_differ_by_one_sample_at_most(num_rows, batch_size):
    sizes = divide_rows(num_rows, batch_size, even=True)
    is_odd_in_pairs = batch_size == 2 and num_rows > 2 and num_rows % 2 == 1
    assert sum(sizes) == num_rows - is_odd_in_pairs
    assert len(sizes) == -(-num_rows // batch_size) - is_odd_in_pairs
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert max(sizes, default=0) <= batch_size
    assert min(sizes, default=0) != 1 or num_rows == 1 or batch_size == 1


@given(num_rows=st.integers(0, 5000), batch_size=st.integers(1, 300))
def test_other_batches_are_full_but_for_the_last(num_rows, batch_size):
    sizes = divide_rows(num_rows, batch_size, even=False)
    assert sum(sizes) == num_rows
    assert all(size == batch_size for size in sizes[:-1])
    assert not sizes or 1 <= sizes[-1] <= batch_size


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "expected"),
    [(200, 128, [100, 100]), (33, 16, [11, 11, 11]), (60, 128, [60]), (4, 3, [2, 2]), (3, 2, [2]), (1, 2, [1])],
)
def test_even_batches_of(num_rows, batch_size, expected):
    assert divide_rows(num_rows, batch_size, even=True) == expected


def test_the_row_that_pairs_leave_out_is_another_in_another_epoch(write):
    written = write(33)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=2)
    left_out = set()
    for epoch in range(8):
        seen = [i for ids in ids_of(read_all(reader, epoch=epoch, even=True)) for i in ids]
        (row,) = set(written.sample_ids.tolist()) - set(seen)
        left_out.add(row)
    assert len(left_out) > 1


def test_order_depends_on_seed_and_epoch_only(write):
    written = write(200, rows_per_shard=7)
    orders = []
    for threads in (1, 2, 5):
        for delays_s in ((), (0.004, 0.0, 0.001), (0.0, 0.003)):
            store = SlowStore(written.store.uri, delays_s)
            reader = ShardReader(store, written.shards, written.spec, batch_size=16, prefetch_threads=threads)
            orders.append(ids_of(read_all(reader, seed=3, epoch=2)))
    assert all(order == orders[0] for order in orders)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=16)
    others = [ids_of(read_all(reader, seed=seed, epoch=epoch)) for seed, epoch in ((3, 1), (4, 2), (2, 3))]
    assert all(order != orders[0] for order in others)


def test_shuffle_mixes_the_shards_of_a_window_and_the_windows(write):
    written = write(400, rows_per_shard=10)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=20, window_shards=4)
    shard_of = {sample_id: row // 10 for row, sample_id in enumerate(written.sample_ids.tolist())}
    batches = read_all(reader)
    shards_per_batch = [len({shard_of[sample_id] for sample_id in ids}) for ids in ids_of(batches)]
    assert all(2 <= count <= 4 for count in shards_per_batch)
    first = {shard_of[sample_id] for batch in ids_of(batches)[:2] for sample_id in batch}
    assert first != {0, 1, 2, 3}


def test_at_most_two_windows_are_alive(write, monkeypatch):
    written = write(400, rows_per_shard=10)
    lock, alive, most = threading.Lock(), set(), []
    real = reader_module.read_shard

    def counted(*args):
        shard = real(*args)
        with lock:
            alive.add(id(shard))
            weakref.finalize(shard, alive.discard, id(shard))
            most.append(len(alive))
        return shard

    at_next_fetch = []
    real_fetch = ShardReader._fetch

    def fetch(self, pool, window):
        at_next_fetch.append(len(alive))
        return real_fetch(self, pool, window)

    monkeypatch.setattr(reader_module, "read_shard", counted)
    monkeypatch.setattr(ShardReader, "_fetch", fetch)
    reader = ShardReader(
        written.store, written.shards, written.spec, batch_size=7, window_shards=3, prefetch_threads=4
    )
    batches = reader.batches(seed=0, epoch=0, shuffle=True)
    total = 0
    for batch in batches:
        total += len(batch.labels)
        deadline = time.monotonic() + 0.002  # lets the prefetching threads run ahead as far as they may
        while time.monotonic() < deadline:
            time.sleep(0.0005)
    assert total == 400
    assert len(most) == 40
    assert 3 < max(most) <= 6
    assert max(at_next_fetch) == 3  # the window before is gone when the window after is asked for
    assert not alive


def test_batches_own_aligned_writable_memory(write):
    written = write(50)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=8)
    batches = read_all(reader, shuffle=False)
    for batch in batches:
        assert batch.tensors.ctypes.data % 64 == 0
        assert batch.tensors.flags.c_contiguous
        assert batch.tensors.flags.writeable
        assert batch.tensors.view(np.float16).shape == (len(batch.labels), 12)
    before = batches[1].tensors.copy()
    batches[0].tensors[:] = 0
    assert np.array_equal(batches[1].tensors, before)


def test_next_window_is_fetched_while_the_first_is_consumed(write):
    written = write(80, rows_per_shard=10)
    store = SlowStore(written.store.uri)
    reader = ShardReader(store, written.shards, written.spec, batch_size=10, window_shards=2)
    batches = reader.batches(seed=0, epoch=0, shuffle=True)
    next(batches)
    deadline = time.monotonic() + 30
    while len(store.reads) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(store.reads) == 4
    batches.close()


def test_waiting_for_data_is_counted(write):
    written = write(20)
    store = SlowStore(written.store.uri)
    store.gate.clear()
    reader = ShardReader(store, written.shards, written.spec, batch_size=20)
    threading.Timer(0.2, store.gate.set).start()
    assert len(read_all(reader)) == 1
    assert reader.wait_s > 0.1


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_early_close_leaves_no_threads(write, num_taken):
    written = write(100)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=10, prefetch_threads=3)
    batches = reader.batches(seed=0, epoch=0, shuffle=True)
    for _ in range(num_taken):
        next(batches)
    batches.close()
    assert live_reader_threads() == []


def test_exception_in_the_consumer_leaves_no_threads(write):
    written = write(100)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=10)

    def consume():
        for _ in reader.batches(seed=0, epoch=0, shuffle=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert live_reader_threads() == []


def test_missing_and_damaged_shards_end_the_epoch_with_their_name(write):
    written = write(100)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=10)
    damaged, missing = written.shards[4], written.shards[5]
    data = bytearray(written.store.get(damaged.key))
    data[100] ^= 1
    written.store.put(damaged.key, data)
    with pytest.raises(ObjectCorrupt, match=damaged.key):
        read_all(reader, shuffle=False)
    written.store.delete([damaged.key, missing.key])
    with pytest.raises(ObjectMissing):
        read_all(reader)
    assert live_reader_threads() == []


def test_store_that_hangs_is_given_up(write):
    written = write(40)
    store = SlowStore(written.store.uri)
    store.gate.clear()
    reader = ShardReader(store, written.shards, written.spec, batch_size=10)
    with pytest.raises(StorageError, match="4 of 4 shards did not arrive"):
        read_all(reader, timeout_s=0.1)
    store.gate.set()


def test_reader_serves_several_epochs_at_once(write):
    written = write(60)
    reader = ShardReader(written.store, written.shards, written.spec, batch_size=10)
    pairs = list(
        zip(
            reader.batches(seed=0, epoch=0, shuffle=True),
            reader.batches(seed=0, epoch=0, shuffle=True),
            strict=True,
        )
    )
    assert all(np.array_equal(first.tensors, second.tensors) for first, second in pairs)


def test_split_without_shards_has_no_batches(store, write):
    spec = write(1).spec
    reader = ShardReader(store, (), spec, batch_size=4)
    assert (reader.num_rows, reader.num_batches(), read_all(reader)) == (0, 0, [])


@pytest.mark.s3
def test_reader_prefetches_from_s3(minio_uri, write):
    written = write(100)
    store = open_store(minio_uri)
    for shard in written.shards:
        store.put(shard.key, written.store.get(shard.key))
    local = ShardReader(written.store, written.shards, written.spec, batch_size=16)
    remote = ShardReader(store, written.shards, written.spec, batch_size=16, prefetch_threads=4)
    assert ids_of(read_all(remote)) == ids_of(read_all(local))
