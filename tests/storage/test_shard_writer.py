"""What a writer puts into a store, how much it holds meanwhile, and that a failure publishes nothing."""

import threading

import numpy as np
import pytest
from shard_rows import rows_of, shard_key

from nf_pipeline.errors import InternalError, StorageError
from nf_pipeline.storage import shard_writer as writer_module
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec, read_shard


class WatchedStore(LocalStore):
    """A folder store whose writes wait for `gate` and fail for keys that contain `broken`."""

    def __init__(self, root):
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.broken = "nothing is broken"
        self.now = self.most = 0
        self._count = threading.Lock()

    def put(self, key, data):
        with self._count:
            self.now += 1
            self.most = max(self.most, self.now)
        self.entered.set()
        self.gate.wait(30)
        try:
            if self.broken in key:
                raise StorageError("the disk is full", self.uri)
            super().put(key, data)
        finally:
            with self._count:
                self.now -= 1


def test_same_rows_give_the_same_bytes(store):
    spec = TensorSpec("float32", (4, 4), "zstd")
    checksums = set()
    for attempt in ("a", "b"):
        with ShardWriter(store, lambda idx, a=attempt: f"{a}/{idx}", spec, 20 * spec.nbytes) as writer:
            writer.append(*rows_of(spec, 50))
        checksums.add(tuple(shard.checksum for shard in writer.close()))
    assert len(checksums) == 1


def test_writer_without_rows_writes_nothing(store):
    with ShardWriter(store, shard_key, TensorSpec("uint8", (4,)), 100) as writer:
        writer.append(*rows_of(TensorSpec("uint8", (4,)), 0))
    assert writer.close() == []
    assert store.list("") == []


def test_sample_larger_than_a_shard_gets_a_shard_of_its_own(store):
    spec = TensorSpec("uint8", (1000,))
    with ShardWriter(store, shard_key, spec, 100) as writer:
        writer.append(*rows_of(spec, 3))
    assert [shard.num_rows for shard in writer.close()] == [1, 1, 1]


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("nbytes", [1, 64, 3072, 9 * 2**20])
def test_incompressible_samples_of_any_size_fit_the_encoding_buffer(store, codec, nbytes):
    spec = TensorSpec("uint8", (nbytes,), codec)
    num_rows = max(2, min(50_000, 2**24 // nbytes))
    tensors, labels, sample_ids = rows_of(spec, num_rows)
    with ShardWriter(store, shard_key, spec, num_rows * nbytes) as writer:
        writer.append(tensors, labels * 2**60, sample_ids * 2**40)
    (shard,) = writer.close()
    assert np.array_equal(read_shard(store, shard, spec).tensors, tensors)


def test_exception_in_the_with_block_uploads_nothing_more(tmp_path):
    store = WatchedStore(str(tmp_path))
    spec = TensorSpec("uint8", (8,))
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(store, shard_key, spec, 80, upload_threads=1) as writer,
    ):
        store.gate.clear()
        writer.append(*rows_of(spec, 20))
        assert store.entered.wait(30)
        threading.Timer(0.2, store.gate.set).start()
        raise ZeroDivisionError
    assert [key for key, _ in store.list("")] == [shard_key(0)]  # was on its way already
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-writer")]


def test_failed_upload_surfaces_on_a_later_append(tmp_path):
    store = WatchedStore(str(tmp_path))
    store.broken = "00001"
    spec = TensorSpec("uint8", (8,))
    with pytest.raises(StorageError, match="disk is full"), ShardWriter(store, shard_key, spec, 80) as writer:
        for _ in range(1000):
            writer.append(*rows_of(spec, 10))
    assert len(store.list("")) < 1000


def test_failed_upload_of_the_last_shard_surfaces_on_close(tmp_path):
    store = WatchedStore(str(tmp_path))
    store.broken = "00000"
    spec = TensorSpec("uint8", (8,))
    writer = ShardWriter(store, shard_key, spec, 80)
    writer.append(*rows_of(spec, 5))
    with pytest.raises(StorageError, match="disk is full"):
        writer.close()
    with pytest.raises(StorageError, match="disk is full"):
        writer.close()


def test_uploads_in_flight_and_buffers_are_bounded(tmp_path, monkeypatch):
    store = WatchedStore(str(tmp_path))
    made = []
    real = writer_module._ShardBuffer.__init__
    monkeypatch.setattr(
        writer_module._ShardBuffer, "__init__", lambda self, *args: made.append(self) or real(self, *args)
    )
    spec = TensorSpec("uint8", (8,))
    with ShardWriter(store, shard_key, spec, 80, upload_threads=2) as writer:
        for _ in range(40):
            writer.append(*rows_of(spec, 10))
    assert store.most <= 2
    assert len(made) <= 3
    assert len(writer.close()) == 40


def test_upload_that_hangs_is_given_up(tmp_path):
    store = WatchedStore(str(tmp_path))
    store.gate.clear()
    spec = TensorSpec("uint8", (8,))
    with (
        pytest.raises(StorageError, match="no shard was uploaded"),
        ShardWriter(store, shard_key, spec, 80, timeout_s=0.1) as writer,
    ):
        for _ in range(10):
            writer.append(*rows_of(spec, 10))
    store.gate.set()


def test_append_after_the_end_is_a_bug(store):
    spec = TensorSpec("uint8", (8,))
    with ShardWriter(store, shard_key, spec, 80) as writer:
        pass
    with pytest.raises(InternalError, match="after"):
        writer.append(*rows_of(spec, 1))


def test_cancelled_writer_takes_and_returns_nothing_more(tmp_path):
    store = WatchedStore(str(tmp_path))
    store.gate.clear()
    spec = TensorSpec("uint8", (8,))
    writer = ShardWriter(store, shard_key, spec, 80, upload_threads=1)
    writer.append(*rows_of(spec, 20))
    threading.Timer(0.1, store.gate.set).start()
    writer.cancel()
    with pytest.raises(InternalError, match="cancelled"):
        writer.append(*rows_of(spec, 1))
    with pytest.raises(InternalError, match="cancelled"):
        writer.close()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tensors", lambda rows: (rows[0].astype(np.float32), rows[1], rows[2])),
        ("tensors", lambda rows: (rows[0][:, :-1], rows[1], rows[2])),
        ("labels", lambda rows: (rows[0], rows[1].astype(np.int32), rows[2])),
        ("sample_ids", lambda rows: (rows[0], rows[1], rows[2][:-1])),
    ],
)
def test_rows_of_another_form_are_refused(store, name, change):
    spec = TensorSpec("uint8", (8,))
    with ShardWriter(store, shard_key, spec, 80) as writer, pytest.raises(InternalError, match=name):
        writer.append(*change(rows_of(spec, 4)))
