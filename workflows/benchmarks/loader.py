"""Reads shuffled batches of stored activations in every way that is at hand, and prints one table.

    python workflows/benchmarks/loader.py --data DIR --s3 s3://bucket/prefix --output loader.json

The tensors are what the first layers of an untrained network make of the images in `--data` (rectified, half zeros).
Every format holds the same tensors; a reading is one epoch of shuffled batches in the host's memory. Formats take
turns, so that a slow minute of the machine does not hit one alone; rates are medians, in MB/s of the bytes that are
stored and of those that the same tensors take as float16, and shares are medians of the ratios within one turn. All
files are in the operating system's memory; the first epoch, in which our reader compares checksums, stands apart.

The limit of a local format is a plain read of the same files in order, in pieces of a batch, into as many buffers as
our reader has batches alive: what it costs to hand the same bytes over at all. The stricter one reads into a single
buffer of 1 MiB, which never leaves the processor's cache, so that its bytes are nobody's batch. On S3 the limit is
fetching whole objects with the same client and as many requests at a time. Rows "as float32" are what a training step
takes over: widened, laid out and, for uint8, scaled.

The other libraries read in this process and in worker processes, and litdata both of two ways to store a tensor; the
quickest of a trial epoch takes part. The extra `bench-peers` installs them; what is not installed is a row that says
so. Endpoint and credentials of S3 come from the environment. Entry: `measure`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from nf_pipeline import RunConfig
from nf_pipeline.config import resolve_config
from nf_pipeline.core.layers import cut
from nf_pipeline.core.models import build_model
from nf_pipeline.data.ingest import ingest
from nf_pipeline.errors import NFError
from nf_pipeline.gang import Gang
from nf_pipeline.samples import inputs_of, target_of
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.reader import BATCHES_AHEAD, PREFETCH_THREADS, ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.feed import Feed, open_feed
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.write_activations import ChannelRanges, encode_activations, quantise_activations

MODEL = "vgg11_bn"
BATCH = 128
SHARD_BYTES = 32 * 2**20
KEPT_BATCHES = BATCHES_AHEAD + 2
NUM_WORKERS = os.cpu_count() or 1
NOT_INSTALLED = "not installed"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tensors that every format stores.

    Attributes:
        x_NCHW: float32, on the CPU.
        labels: int64 [N].
    """

    x_NCHW: torch.Tensor
    labels: np.ndarray

    @property
    def half_NCHW(self) -> np.ndarray:
        """The tensors as float16."""
        return self.x_NCHW.half().numpy()

    @property
    def logical_bytes(self) -> int:
        """Bytes of the tensors as float16."""
        return 2 * self.x_NCHW.numel()


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store and read them.

    Attributes:
        name: in the table.
        limits: names of formats whose rates of stored bytes are the most that this one could reach; the first is the
            one that counts. None for a limit.
        stored_bytes: read per epoch.
        read: reads one epoch, given its number, and returns how many rows came.
    """

    name: str
    limits: tuple[str, ...] = ()
    stored_bytes: int
    read: Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One row of the table.

    Attributes:
        name, limits: see `Format`.
        stored_mb_s: median over the repetitions, with the smallest and largest; None where it could not be measured.
        logical_mb_s: of the same tensors as float16.
        first_mb_s: stored bytes of the first epoch, in which our reader compares checksums.
        cpu_mb_s: stored bytes per CPU second of this process; None where others took part.
        of_limits: medians of the ratios to the limits' rates in the same repetition.
        note: why there is no number.
    """

    name: str
    limits: tuple[str, ...] = ()
    stored_mb_s: float | None = None
    spread: tuple[float, float] | None = None
    logical_mb_s: float | None = None
    first_mb_s: float | None = None
    cpu_mb_s: float | None = None
    of_limits: tuple[float, ...] = ()
    note: str = ""


def make_rows(config: RunConfig, folder: str, num_rows: int, num_layers: int) -> Rows:
    """Runs images through the first layers of a network."""
    store, layout = open_store(folder), RunLayout("images")
    for _ in ingest(store, layout, config, "a"):
        pass
    manifest = read_ingest(store, layout)
    inputs, target = inputs_of(manifest.facts), target_of(manifest.facts)
    model = build_model(MODEL, inputs=inputs, num_outputs=target.size, seed=0)
    layers = cut(model, inputs).layers[:num_layers]  # in training mode: normalised by the batch's own statistics
    parts, labels = [], []
    feed = open_feed(store, manifest, "train", batch_size=BATCH, device=torch.device("cpu"))
    with torch.no_grad():
        for batch in islice(feed.batches(), -(-num_rows // BATCH)):
            x_NCHW = batch.take_x()
            for layer in layers:
                x_NCHW = layer(x_NCHW)
            parts.append(x_NCHW)
            labels.append(batch.y_N.numpy())
    return Rows(x_NCHW=torch.cat(parts)[:num_rows].contiguous(), labels=np.concatenate(labels)[:num_rows])


def our_shards(store: Store, rows: Rows, dtype: str, codec: str) -> tuple[TensorSpec, list[ShardInfo]]:
    """Stores the tensors as a block's activations are stored."""
    affine = None
    if dtype == "uint8":
        ranges = ChannelRanges(rows.x_NCHW.shape[1])
        ranges.add(rows.x_NCHW, "benchmark")
        affine = ranges.fit(Replicas("benchmark", Gang(), torch.device("cpu")))
    spec = TensorSpec(dtype, tuple(rows.x_NCHW.shape[1:]), codec, affine)
    with ShardWriter(store, lambda idx: f"{dtype}-{codec}/{idx:05d}.parquet", spec, SHARD_BYTES) as writer:
        for start in range(0, len(rows.labels), BATCH):
            x_NCHW, labels = rows.x_NCHW[start : start + BATCH], rows.labels[start : start + BATCH]
            stored = (
                quantise_activations(x_NCHW, affine, "benchmark")[0]
                if affine
                else encode_activations(x_NCHW, dtype, "benchmark")
            )
            writer.append(stored, labels, np.arange(start, start + len(labels)))
    return spec, writer.close()


def ours(store: Store, rows: Rows, dtype: str, codec: str, place: str) -> list[Format]:
    """Our reader, the feed of training on top of it, and what reads the same objects with nothing else."""
    spec, shards = our_shards(store, rows, dtype, codec)
    num_bytes = sum(shard.num_bytes for shard in shards)
    what = f"{dtype}, {codec}"
    feed = Feed(ShardReader(store, shards, spec, batch_size=BATCH), spec, torch.device("cpu"), None)
    reader = ShardReader(store, shards, spec, batch_size=BATCH)

    def read(epoch: int) -> int:
        return sum(len(batch.labels) for batch in reader.batches(seed=0, epoch=epoch, shuffle=True))

    def feed_all(epoch: int) -> int:
        return sum(len(batch.take_x()) for batch in feed.batches(seed=0, epoch=epoch, shuffle=True))

    if place == "local":
        plain = {
            f"limit: the same {what} files, plain read": read_files(store, shards, BATCH * spec.nbytes, KEPT_BATCHES),
            f"strict limit: the same {what} files, into 1 MiB": read_files(store, shards, 2**20, 1),
        }
    else:
        plain = {f"limit: the same {place} objects, {what}": read_objects(store, shards)}
    limits = tuple(plain)
    taken = {f"nf_pipeline, {place}: {what}": read, f"nf_pipeline, {place}: {what}, as float32": feed_all}
    return [
        *(Format(name=name, stored_bytes=num_bytes, read=each) for name, each in plain.items()),
        *(Format(name=name, limits=limits, stored_bytes=num_bytes, read=each) for name, each in taken.items()),
    ]


def read_files(
    store: Store, shards: Sequence[ShardInfo], buffer_bytes: int, num_buffers: int
) -> Callable[[int], int]:
    """Plain reading, in order, into buffers that are used again."""
    buffers = cycle([memoryview(bytearray(buffer_bytes)) for _ in range(num_buffers)])

    def read(_: int) -> int:
        for shard in shards:
            with open(f"{store.uri}/{shard.key}", "rb", buffering=0) as file:
                while file.readinto(next(buffers)):
                    pass
        return sum(shard.num_rows for shard in shards)

    return read


def read_objects(store: Store, shards: Sequence[ShardInfo]) -> Callable[[int], int]:
    """Fetching whole objects, as many at a time as our reader does."""

    def fetch(shard: ShardInfo) -> int:
        return shard.num_rows if len(store.get(shard.key)) == shard.num_bytes else 0

    def read(_: int) -> int:
        with ThreadPoolExecutor(PREFETCH_THREADS) as pool:
            return sum(pool.map(fetch, shards))

    return read


def gather(rows: Rows) -> Format:
    """Rows of a tensor in memory, in random order."""
    x_NCHW = rows.half_NCHW

    def read(epoch: int) -> int:
        order = np.random.default_rng(epoch).permutation(len(x_NCHW))
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        return sum(len(np.take(x_NCHW, np.sort(part), axis=0, mode="clip")) for part in parts)

    name = "limit: gather from memory, float16"
    return Format(name=name, stored_bytes=rows.logical_bytes, read=read)


def count_rows(batches: Iterator[torch.Tensor]) -> int:
    """Takes whole batches."""
    return sum(len(batch) for batch in batches)


Readings = dict[str, Callable[[int], int]]
"""Ways to read one epoch, by what is special about them."""


def webdataset(rows: Rows, folder: Path) -> Readings:
    """Tar files of raw bytes, a shuffle buffer of 1,024 samples, batches made by whoever reads."""
    import webdataset as wds

    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as sink:
        for idx, (x_CHW, label) in enumerate(zip(rows.half_NCHW, rows.labels, strict=True)):
            sink.write({"__key__": f"{idx:08d}", "x": x_CHW.tobytes(), "y": str(label).encode()})
    urls, shape = sorted(map(str, folder.glob("*.tar"))), rows.x_NCHW.shape[1:]

    def batch_of(samples: list[dict[str, bytes]]) -> tuple[torch.Tensor, list[int]]:
        x_NK = np.stack([np.frombuffer(sample["x"], np.float16) for sample in samples])
        return torch.from_numpy(x_NK).view(-1, *shape), [int(sample["y"]) for sample in samples]

    def reading(num_workers: int) -> Callable[[int], int]:
        def read(epoch: int) -> int:
            data = wds.WebDataset(urls, shardshuffle=100, seed=epoch, workersplitter=wds.split_by_worker)
            batches = data.shuffle(1024).listed(BATCH).map(batch_of)
            return count_rows(x for x, _ in torch.utils.data.DataLoader(batches, None, **workers(num_workers)))

        return read

    return in_and_out_of_process(reading)


def litdata(rows: Rows, folder: Path) -> Readings:
    """Chunks of tensors as it stores them by default, and of raw bytes that are viewed as tensors again."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    shape = rows.x_NCHW.shape[1:]

    def viewed(item: dict[str, object]) -> dict[str, object]:
        return {"x": torch.frombuffer(bytearray(item["x"]), dtype=torch.float16).view(shape), "y": item["y"]}

    def written(kind: str) -> str:
        writer = BinaryWriter(str(folder / kind), chunk_bytes=SHARD_BYTES)
        for idx, (x_CHW, label) in enumerate(zip(rows.half_NCHW, rows.labels, strict=True)):
            writer[idx] = {"x": torch.from_numpy(x_CHW) if kind == "tensors" else x_CHW.tobytes(), "y": int(label)}
        writer.done()
        writer.merge(1)
        return str(folder / kind)

    def reading(path: str, num_workers: int) -> Callable[[int], int]:
        transform = viewed if path.endswith("bytes") else None
        data = StreamingDataset(path, shuffle=True, drop_last=False, transform=transform)
        loader = StreamingDataLoader(data, batch_size=BATCH, **workers(num_workers))
        return lambda _: count_rows(batch["x"] for batch in loader)

    readings: Readings = {}
    for kind in ("tensors", "bytes"):
        found = in_and_out_of_process(partial(reading, written(kind)))
        readings |= {f"{kind}, {name}": read for name, read in found.items()}
    return readings


def mosaicml(rows: Rows, folder: Path) -> Readings:
    """MDS shards of arrays, torch's loader."""
    from streaming import MDSWriter, StreamingDataset

    sides = ",".join(str(size) for size in rows.x_NCHW.shape[1:])
    columns = {"x": f"ndarray:float16:{sides}", "y": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as sink:
        for x_CHW, label in zip(rows.half_NCHW, rows.labels, strict=True):
            sink.write({"x": x_CHW, "y": int(label)})

    def reading(num_workers: int) -> Callable[[int], int]:
        data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH, **workers(num_workers))
        return lambda _: count_rows(batch["x"] for batch in loader)

    return in_and_out_of_process(reading)


def in_and_out_of_process(reading: Callable[[int], Callable[[int], int]]) -> Readings:
    """Reads in this process, and in one worker process per core."""
    return {"in process": reading(0), f"{NUM_WORKERS} workers": reading(NUM_WORKERS)}


def workers(number: int) -> dict[str, int]:
    """Arguments of a loader: every worker has as many batches ahead as our reader."""
    return {"num_workers": number, "prefetch_factor": BATCHES_AHEAD} if number else {"num_workers": 0}


PEERS = {"webdataset": webdataset, "litdata": litdata, "mosaicml-streaming": mosaicml}


def peers(rows: Rows, folder: Path, limits: tuple[str, ...]) -> list[Format | Rate]:
    """What other libraries make of the same tensors on the local disk, float16 without a codec."""
    found: list[Format | Rate] = []
    for name, store in PEERS.items():
        try:
            title = f"{name} {version(name)}, local: float16"
        except PackageNotFoundError:
            found.append(Rate(name=name, limits=limits, note=NOT_INSTALLED))
            continue
        tried = [
            Format(name=f"{title}, {how}", limits=limits, stored_bytes=rows.logical_bytes, read=read)
            for how, read in store(rows, folder / name).items()
        ]
        seconds = {each.name: _timed(each, 0, len(rows.labels)) for each in tried}
        print({name: round(taken, 2) for name, taken in seconds.items()}, file=sys.stderr)
        found.append(min(tried, key=lambda each: seconds[each.name]))
    return found


def measure(formats: Sequence[Format], rows: Rows, repeats: int) -> list[Rate]:
    """Reads every format once, and then all of them `repeats` times in turn.

    Raises:
        RuntimeError: a format did not give every row.
    """
    first = {each.name: _timed(each, 0, len(rows.labels)) for each in formats}
    seconds: dict[str, list[float]] = {each.name: [] for each in formats}
    cpu_seconds: dict[str, list[float]] = {each.name: [] for each in formats}
    for epoch in range(1, repeats + 1):
        for each in formats:
            before = time.process_time()
            seconds[each.name].append(_timed(each, epoch, len(rows.labels)))
            cpu_seconds[each.name].append(time.process_time() - before)
    of = {each.name: [each.stored_bytes / 1e6 / taken for taken in seconds[each.name]] for each in formats}
    return [
        Rate(
            name=each.name,
            limits=each.limits,
            stored_mb_s=statistics.median(of[each.name]),
            spread=(min(of[each.name]), max(of[each.name])),
            logical_mb_s=rows.logical_bytes / 1e6 / statistics.median(seconds[each.name]),
            first_mb_s=each.stored_bytes / 1e6 / first[each.name],
            cpu_mb_s=_cpu_rate(each, cpu_seconds[each.name]),
            of_limits=tuple(_ratio(of[each.name], of[limit]) for limit in each.limits),
        )
        for each in formats
    ]


def _ratio(own: Sequence[float], limit: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, limit, strict=True))


def _cpu_rate(each: Format, cpu_seconds: Sequence[float]) -> float | None:
    return None if "workers" in each.name else each.stored_bytes / 1e6 / statistics.median(cpu_seconds)


def _timed(each: Format, epoch: int, num_rows: int) -> float:
    start = time.perf_counter()
    got = each.read(epoch)
    seconds = time.perf_counter() - start
    if got != num_rows:
        raise RuntimeError(f"{each.name}: got {got} rows, want {num_rows}")
    return seconds


def render_table(rates: Sequence[Rate]) -> str:
    """Formats one row per format as Markdown."""
    lines = [
        "| format | stored MB/s | smallest - largest | as float16, MB/s | first epoch, stored MB/s "
        "| stored MB per CPU s | of its limit | of the strict one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        if rate.stored_mb_s is None:
            lines.append(f"| {rate.name} | {rate.note} | | | | | | |")
            continue
        shares = [f"{share:.0%}" for share in rate.of_limits] + ["", ""]
        spread = f"{rate.spread[0]:,.0f} - {rate.spread[1]:,.0f}"
        numbers = f"{rate.stored_mb_s:,.0f} | {spread} | {rate.logical_mb_s:,.0f} | {rate.first_mb_s:,.0f}"
        cpu = "" if rate.cpu_mb_s is None else f"{rate.cpu_mb_s:,.0f}"
        lines.append(f"| {rate.name} | {numbers} | {cpu} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="images: whatever nf-pipeline reads")
    parser.add_argument("--image-size", type=int, default=32, help="pixels on both sides")
    parser.add_argument("--s3", help="s3://bucket/prefix to write to and read from as well")
    parser.add_argument("--rows", type=int, default=12288, help="samples")
    parser.add_argument("--layers", type=int, default=1, help="of the network, whose output is stored")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on which disk; by default that of temporary files")
    parser.add_argument("--output", type=Path, help="JSON with all numbers; the table goes beside it as .md")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace, folder: Path) -> tuple[Rows, list[Rate]]:
    """Stores the tensors in every format and measures."""
    images = {"data.source": given.data, "data.image_size": given.image_size}
    config = resolve_config(flags={**images, "memory.budget_bytes": "1GiB", "run": "images"})
    rows = make_rows(config, str(folder), given.rows, given.layers)
    local = open_store(str(folder / "shards"))
    kinds = [("float16", "none"), ("uint8", "none"), ("float16", "zstd"), ("uint8", "zstd")]
    formats = [each for kind in kinds for each in ours(local, rows, *kind, "local")]
    limits = formats[2].limits
    if given.s3:
        remote = open_store(given.s3)
        formats += [each for dtype in ("float16", "uint8") for each in ours(remote, rows, dtype, "none", "S3")]
    others = peers(rows, folder, limits)
    readable = [gather(rows), *formats, *(each for each in others if isinstance(each, Format))]
    rates = measure(readable, rows, given.repeats)
    return rows, rates + [each for each in others if isinstance(each, Rate)]


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; returns the exit code."""
    given = parse_arguments(arguments)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="nf-loader-", dir=given.folder) as folder:
            rows, rates = run(given, Path(folder))
    except NFError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    shape = "x".join(map(str, rows.x_NCHW.shape))
    where = f"{date.today()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    title = f"{shape} of {MODEL}, {rows.logical_bytes / 1e6:,.0f} MB as float16, batches of {BATCH}; {where}"
    table = f"{title}\n\n{render_table(rates)}\n"
    print(table)
    if given.output:
        document = {"title": title, "rows": list(rows.x_NCHW.shape), "rates": [asdict(rate) for rate in rates]}
        given.output.write_text(json.dumps(document, indent=2) + "\n")
        given.output.with_suffix(".md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
