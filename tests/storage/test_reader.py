"""Batches: every row once, the same whatever the timing, bounded memory, and a clean end."""

import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nf_pipeline.errors import InputReplaced, ObjectCorrupt, ObjectMissing, StorageError
from nf_pipeline.storage import gather as gather_module
from nf_pipeline.storage import reader as reader_module
from nf_pipeline.storage import shard_writer as writer_module
from nf_pipeline.storage import shards as shards_module
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.parts import Part, divide_rows, part_rows
from nf_pipeline.storage.reader import ShardReader
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


class GrowingList:
    """Shards of which the first `num_stored` can be had; the others are waited for until `close`."""

    def __init__(self, shards, num_stored=0):
        self._shards = list(shards)
        self._changed = threading.Condition()
        self._num_stored = num_stored
        self._is_closed = False
        self.error = None
        self.asked = []

    def __len__(self):
        return len(self._shards)

    def num_rows(self, shard_idx):
        return self._shards[shard_idx].num_rows

    def get(self, shard_idx):
        with self._changed:
            self.asked.append(shard_idx)
            self._changed.wait_for(lambda: shard_idx < self._num_stored or self._is_closed or self.error)
            if self.error:
                raise self.error
            if shard_idx >= self._num_stored:
                raise StorageError("closed")
            return self._shards[shard_idx]

    def store(self, num_stored):
        with self._changed:
            self._num_stored = num_stored
            self._changed.notify_all()

    def fail(self, error):
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def close(self):
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def open_reader(written, **options):
    return ShardReader(written.store, written.shards, written.spec, **{"batch_size": 8, **options})


def rows_of(written, batches):
    row_of = {sample_id: row for row, sample_id in enumerate(written.sample_ids.tolist())}
    return [[row_of[sample_id] for sample_id in batch.sample_ids.tolist()] for batch in batches]


def read_all(reader, **options):
    defaults = {"seed": 0, "epoch": 0, "shuffle": True}
    return list(reader.batches(**{**defaults, **options}))


def ids_of(batches):
    return [batch.sample_ids.tolist() for batch in batches]


def sorted_ids(batches):
    return sorted(sample_id for ids in ids_of(batches) for sample_id in ids)


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_true()


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

    def counted(*args, **options):
        shard = real(*args, **options)
        with lock:
            alive.add(id(shard))
            weakref.finalize(shard, alive.discard, id(shard))
            most.append(len(alive))
        return shard

    at_next_fetch = []
    real_fetch = ShardReader._fetch

    def fetch(self, *args):
        at_next_fetch.append(len(alive))
        return real_fetch(self, *args)

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
    reader = ShardReader(store, written.shards, written.spec, batch_size=2, window_shards=2)
    batches = reader.batches(seed=0, epoch=0, shuffle=True)
    next(batches)
    deadline = time.monotonic() + 30
    while len(store.reads) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(store.reads) == 4
    batches.close()


def test_batches_are_gathered_ahead_of_the_consumer_and_no_further(write, monkeypatch):
    written, finished = write(200), []
    real = gather_module._Rows.copy
    monkeypatch.setattr(gather_module._Rows, "copy", lambda *args: finished.append(args[2]) or real(*args))
    batches = open_reader(written, batch_size=5, window_shards=20).batches(seed=0, epoch=0, shuffle=True)
    for num_taken in (0, 1, 2, 3):
        if num_taken:
            next(batches)
        wait_until(lambda want=num_taken + reader_module.BATCHES_AHEAD: len(finished) == want)
    time.sleep(0.05)
    assert len(finished) == 3 + reader_module.BATCHES_AHEAD
    batches.close()


def test_gathering_counts_as_waiting_when_the_consumer_has_to_wait_for_it(write, monkeypatch):
    real = gather_module._Rows.copy
    monkeypatch.setattr(gather_module._Rows, "copy", lambda *args: time.sleep(0.04) or real(*args))
    reader = open_reader(write(100), batch_size=10)
    read_all(reader)
    assert reader.wait_s > 0.1


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_batches_come_in_order_however_long_each_of_them_takes_to_copy(write, monkeypatch, slow):
    written = write(120)
    expected = read_all(open_reader(written, batch_size=7))
    real, lock, count = gather_module._Rows.copy, threading.Lock(), []

    def copy(*args):
        with lock:
            count.append(1)
            is_slow = len(count) % 3 == slow
        time.sleep(0.005 * is_slow)
        return real(*args)

    monkeypatch.setattr(gather_module._Rows, "copy", copy)
    assert ids_of(read_all(open_reader(written, batch_size=7))) == ids_of(expected)


def test_what_is_made_of_batches_is_made_ahead_and_its_error_reaches_the_consumer(write):
    written, threads = write(40), set()

    def make(batch):
        threads.add(threading.current_thread().name)
        if batch.sample_ids[0] == written.sample_ids[20]:
            raise ZeroDivisionError
        return batch.sample_ids.tolist()

    batches = open_reader(written, batch_size=10).batches(seed=0, epoch=0, shuffle=False, make=make)
    assert [next(batches), next(batches)] == [written.sample_ids[:10].tolist(), written.sample_ids[10:20].tolist()]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert all(name.startswith("shard-reader") for name in threads)
    assert live_reader_threads() == []


def test_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it(write):
    written = write(400)
    reader, held, seen = open_reader(written, batch_size=10), [], set()
    for epoch in range(2):
        for batch in reader.batches(seed=0, epoch=epoch, shuffle=True):
            seen.add(batch.tensors.ctypes.data)
            if len(held) < 3:
                held.append((batch.tensors[2:4], batch.tensors[2:4].copy()))
    assert all(np.array_equal(view, before) for view, before in held)
    assert len(seen) < 20  # of 80 batches


def test_checksums_are_compared_once_and_form_and_size_every_time(write, monkeypatch):
    written = write(40)
    hashed = []
    real = shards_module.checksum_of
    monkeypatch.setattr(shards_module, "checksum_of", lambda data: hashed.append(len(data)) or real(data))
    reader = open_reader(written)
    first, second = read_all(reader, epoch=0), read_all(reader, epoch=1)
    assert len(hashed) == len(written.shards)
    assert sorted_ids(first) == sorted_ids(second)
    cut = written.store.get(written.shards[0].key)[:-1]
    written.store.put(written.shards[0].key, bytes(cut))
    with pytest.raises(ObjectCorrupt, match="bytes: got"):
        read_all(reader, epoch=2)
    with pytest.raises(ObjectCorrupt):
        read_all(open_reader(written), epoch=2)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_shards_of_several_row_groups_give_every_row_in_every_epoch(write, monkeypatch, codec):
    monkeypatch.setattr(writer_module, "ROW_GROUP_BYTES", 40 * 7)  # of samples of 24 bytes and two numbers
    written = write(61, rows_per_shard=30, codec=codec)
    reader = open_reader(written, batch_size=9, part=Part(index=1, count=2))
    wanted = sorted(written.sample_ids[30:].tolist())
    for epoch in range(2):
        batches = read_all(reader, epoch=epoch)
        assert sorted_ids(batches) == wanted
        for batch, chosen in zip(batches, rows_of(written, batches), strict=True):
            assert np.array_equal(batch.tensors, written.tensors[chosen])


def test_an_abandoned_epoch_does_not_keep_the_process_alive(write):
    written = write(100)
    program = f"""
import sys
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import open_store
shards = [ShardInfo(**shard) for shard in {[asdict(shard) for shard in written.shards]}]
reader = ShardReader(open_store({written.store.uri!r}), shards, TensorSpec("float16", (3, 4)), batch_size=5)
sys.kept = reader.batches(seed=0, epoch=0, shuffle=True)
next(sys.kept)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7


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


def test_order_of_a_whole_split_stays_what_it_always_was(write):
    """Runs are continued by later versions: these rows were recorded with the first one."""
    written = write(33, rows_per_shard=5)
    batches = read_all(open_reader(written, window_shards=3), even=True)
    assert rows_of(written, batches) == [
        [10, 12, 13, 21, 15, 18, 19],
        [11, 14, 20, 22, 23, 24, 17],
        [16, 32, 25, 26, 27, 29, 4],
        [30, 31, 0, 1, 2, 3],
        [28, 5, 6, 7, 8, 9],
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(0, 60),
    rows_per_shard=st.integers(1, 13),
    batch_size=st.integers(1, 20),
    count=st.integers(1, 5),
    shuffle=st.booleans(),
    shuffle_shards=st.booleans(),
    even=st.booleans(),
)
def test_parts_are_disjoint_cover_the_split_and_step_together(
    write, num_rows, rows_per_shard, batch_size, count, shuffle, shuffle_shards, even
):
    written = write(num_rows, rows_per_shard=rows_per_shard)
    steps, seen = set(), []
    for index in range(count):
        part = Part(index=index, count=count)
        reader = open_reader(written, batch_size=batch_size, part=part, window_shards=2)
        batches = read_all(reader, shuffle=shuffle, shuffle_shards=shuffle_shards, even=even)
        sizes = divide_rows(num_rows, batch_size, even=even, part=part)
        assert [len(batch.labels) for batch in batches] == sizes
        assert (reader.num_rows, reader.num_rows_total) == (part_rows(num_rows, count)[index], num_rows)
        assert reader.num_batches(even=even) == len(batches)
        rows = [row for batch in rows_of(written, batches) for row in batch]
        assert set(rows) <= set(part.rows(num_rows))
        if not shuffle:
            assert rows == list(part.rows(num_rows))[: len(rows)]
        for batch, chosen in zip(batches, rows_of(written, batches), strict=True):
            assert np.array_equal(batch.tensors, written.tensors[chosen])
            assert np.array_equal(batch.labels, written.labels[chosen])
        steps.add(len(batches))
        seen += rows
    assert len(seen) == len(set(seen))
    if even:
        assert len(steps) == 1
    else:
        assert len(seen) == num_rows


def test_a_part_fetches_only_shards_with_rows_of_its_own(write):
    written = write(100, rows_per_shard=10)
    for index, touched in [(0, {0, 1, 2, 3}), (1, {3, 4, 5, 6}), (2, {6, 7, 8, 9})]:
        store = SlowStore(written.store.uri)
        part = Part(index=index, count=3)
        list(read_all(ShardReader(store, written.shards, written.spec, batch_size=8, part=part)))
        assert sorted(store.reads) == sorted(written.shards[shard_idx].key for shard_idx in touched)


def test_shards_cut_at_the_border_of_a_part_are_views(write, monkeypatch):
    written = write(20, rows_per_shard=10)
    decoded, filled = [], []
    real_read, real_fill = reader_module.read_shard, gather_module.BatchFiller.fill

    def read(*args, **options):
        decoded.append(real_read(*args, **options))
        return decoded[-1]

    def fill(self, window, rows):
        filled.extend(shard.tensors for shard in window)
        return real_fill(self, window, rows)

    monkeypatch.setattr(reader_module, "read_shard", read)
    monkeypatch.setattr(gather_module.BatchFiller, "fill", fill)
    read_all(open_reader(written, part=Part(index=1, count=3)), shuffle=False)
    assert [len(tensors) for tensors in filled] == [4, 3]
    assert all(any(np.shares_memory(cut, shard.tensors) for shard in decoded) for cut in filled)


def test_without_shuffled_shards_windows_come_in_stored_order_with_their_rows_mixed(write):
    written = write(60, rows_per_shard=5)
    reader = open_reader(written, batch_size=20, window_shards=4)
    batches = rows_of(written, read_all(reader, shuffle_shards=False))
    assert [sorted(rows) for rows in batches] == [list(range(start, start + 20)) for start in (0, 20, 40)]
    halves = rows_of(written, read_all(open_reader(written, batch_size=10, window_shards=4), shuffle_shards=False))
    assert max(halves[0]) > 10 > min(halves[1])
    again = rows_of(written, read_all(reader, shuffle_shards=False))
    other = rows_of(written, read_all(open_reader(written, batch_size=10), shuffle_shards=False, epoch=1))
    assert again == batches
    assert other != halves


def test_an_epoch_starts_on_the_first_shards_and_reads_on_as_they_come(write):
    written = write(60, rows_per_shard=5)
    shards = GrowingList(written.shards, num_stored=2)
    reader = ShardReader(written.store, shards, written.spec, batch_size=10, window_shards=2)
    assert (reader.num_rows, reader.num_batches(even=True)) == (60, 6)
    batches = reader.batches(seed=0, epoch=0, shuffle=True, even=True, shuffle_shards=False)
    growing = [next(batches)]
    for num_stored in range(4, 14, 2):
        shards.store(num_stored)
        growing.append(next(batches))
    assert next(batches, None) is None
    stored = ShardReader(written.store, written.shards, written.spec, batch_size=10, window_shards=2)
    expected = read_all(stored, even=True, shuffle_shards=False)
    assert ids_of(growing) == ids_of(expected)
    assert live_reader_threads() == []


@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_closing_while_shards_are_waited_for_ends_at_once(write, num_taken):
    written = write(60, rows_per_shard=5)
    shards = GrowingList(written.shards, num_stored=4)
    reader = ShardReader(written.store, shards, written.spec, batch_size=10, window_shards=2, prefetch_threads=3)
    batches = reader.batches(seed=0, epoch=0, shuffle=True, shuffle_shards=False)
    for _ in range(num_taken):
        next(batches)
    batches.close()
    assert live_reader_threads() == []


def test_an_error_while_a_shard_is_waited_for_reaches_the_consumer(write):
    written = write(60, rows_per_shard=5)
    shards = GrowingList(written.shards, num_stored=2)
    reader = ShardReader(written.store, shards, written.spec, batch_size=10, window_shards=2)
    batches = reader.batches(seed=0, epoch=0, shuffle=True, shuffle_shards=False)
    next(batches)
    shards.fail(InputReplaced("block-001", "another attempt"))
    with pytest.raises(InputReplaced, match="another attempt"):
        next(batches)
    assert live_reader_threads() == []


def test_shards_that_never_come_are_given_up_and_leave_no_threads(write):
    written = write(40)
    shards = GrowingList(written.shards, num_stored=1)
    reader = ShardReader(written.store, shards, written.spec, batch_size=10)
    with pytest.raises(StorageError, match="3 of 4 shards did not arrive"):
        read_all(reader, timeout_s=0.1)
    deadline = time.monotonic() + 30
    while live_reader_threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert live_reader_threads() == []


def test_a_shard_with_other_rows_than_announced_is_refused(write):
    written = write(40)
    shards = GrowingList(written.shards, num_stored=4)
    announced = [replace(shard, num_rows=9) for shard in written.shards]
    shards.num_rows = lambda shard_idx: announced[shard_idx].num_rows
    reader = ShardReader(written.store, shards, written.spec, batch_size=10)
    with pytest.raises(ObjectCorrupt, match="has 10 rows, want 9"):
        read_all(reader)


def test_only_a_parts_own_shards_are_waited_for(write):
    written = write(60, rows_per_shard=5)
    shards = GrowingList(written.shards, num_stored=6)
    reader = ShardReader(written.store, shards, written.spec, batch_size=10, part=Part(index=0, count=2))
    assert len(read_all(reader)) == 3
    assert set(shards.asked) == set(range(6))


@pytest.mark.s3
def test_reader_prefetches_from_s3(minio_uri, write):
    written = write(100)
    store = open_store(minio_uri)
    for shard in written.shards:
        store.put(shard.key, written.store.get(shard.key))
    local = ShardReader(written.store, written.shards, written.spec, batch_size=16)
    remote = ShardReader(store, written.shards, written.spec, batch_size=16, prefetch_threads=4)
    assert ids_of(read_all(remote)) == ids_of(read_all(local))
