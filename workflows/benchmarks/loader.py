"""Reads shuffled batches of stored activations in every way that is at hand, and prints one table.

    python workflows/benchmarks/loader.py --data DIR --s3 s3://bucket/prefix --output loader.json

The tensors are what the first layers of an untrained network make of the images in `--data` (rectified, half zeros).
Every format holds the same tensors; a reading is one epoch of shuffled batches in the host's memory, as the training
step takes them over. Formats take turns, so that a slow minute of the machine does not hit one alone; rates are
medians, in MB/s of the bytes that are stored and of those that the same tensors take as float16.

Two limits: reading the files into one buffer that is used again, and gathering rows from memory. On S3 the limit is
fetching whole objects with the same client and as many requests at a time. The extra `bench-peers` installs the other
libraries; what is not installed is a row that says so. Endpoint and credentials of S3 come from the environment.
Entry: `measure`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
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
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.reader import PREFETCH_THREADS, ShardReader
from nf_pipeline.storage.shards import ShardInfo, ShardWriter, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.feed import open_feed
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.write_activations import ChannelRanges, encode_activations, quantise_activations

MODEL = "vgg11_bn"
BATCH = 128
SHARD_BYTES = 32 * 2**20
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
        limit: name of the format whose rate of stored bytes is the most that this one could reach; "" for a limit.
        stored_bytes: read per epoch.
        read: reads one epoch, given its number, and returns how many rows came.
    """

    name: str
    limit: str
    stored_bytes: int
    read: Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One row of the table.

    Attributes:
        name, limit: see `Format`.
        stored_mb_s: median over the repetitions, with the smallest and largest; None where it could not be measured.
        logical_mb_s: of the same tensors as float16.
        first_mb_s: stored bytes of the first epoch, in which our reader compares checksums.
        of_limit: median of the ratios to the limit's rate in the same repetition.
        note: why there is no number.
    """

    name: str
    limit: str
    stored_mb_s: float | None = None
    spread: tuple[float, float] | None = None
    logical_mb_s: float | None = None
    first_mb_s: float | None = None
    of_limit: float | None = None
    note: str = ""


def make_rows(config: RunConfig, folder: str, num_rows: int, num_layers: int) -> Rows:
    """Runs images through the first layers of a network."""
    store, layout = open_store(folder), RunLayout("images")
    for _ in ingest(store, layout, config, "a"):
        pass
    manifest = read_ingest(store, layout)
    shape, num_classes = manifest.spec.shape, manifest.facts["num_classes"]
    model = build_model(MODEL, image_shape=shape, num_classes=num_classes, seed=0)
    layers = cut(model, shape).layers[:num_layers]  # in training mode: normalised by the batch's own statistics
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
    """Our reader, and what reads the same objects with nothing else."""
    spec, shards = our_shards(store, rows, dtype, codec)
    reader = ShardReader(store, shards, spec, batch_size=BATCH)
    num_bytes = sum(shard.num_bytes for shard in shards)
    what = f"{dtype}, {codec}"

    def read(epoch: int) -> int:
        return sum(len(batch.labels) for batch in reader.batches(seed=0, epoch=epoch, shuffle=True))

    limit = f"limit: the same {place} objects, {what}"
    whole = read_files(store, shards) if place == "local" else read_objects(store, shards)
    return [
        Format(name=limit, limit="", stored_bytes=num_bytes, read=whole),
        Format(name=f"nf_pipeline, {place}: {what}", limit=limit, stored_bytes=num_bytes, read=read),
    ]


def read_files(store: Store, shards: Sequence[ShardInfo]) -> Callable[[int], int]:
    """Plain reading into one buffer."""
    buffer = memoryview(bytearray(2**20))

    def read(_: int) -> int:
        for shard in shards:
            with open(f"{store.uri}/{shard.key}", "rb", buffering=0) as file:
                while file.readinto(buffer):
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
    return Format(name=name, limit="", stored_bytes=rows.logical_bytes, read=read)


def count_rows(batches: Iterator[torch.Tensor]) -> int:
    """Takes whole batches."""
    return sum(len(batch) for batch in batches)


def webdataset(rows: Rows, folder: Path) -> Callable[[int], int]:
    """Tar files of raw bytes, a shuffle buffer of 1,024 samples."""
    import webdataset as wds

    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as sink:
        for idx, (x_CHW, label) in enumerate(zip(rows.half_NCHW, rows.labels, strict=True)):
            sink.write({"__key__": f"{idx:08d}", "x": x_CHW.tobytes(), "y": str(label).encode()})
    urls, shape = sorted(map(str, folder.glob("*.tar"))), rows.x_NCHW.shape[1:]

    def decode(sample: dict[str, bytes]) -> tuple[torch.Tensor, int]:
        return torch.frombuffer(bytearray(sample["x"]), dtype=torch.float16).view(shape), int(sample["y"])

    def read(epoch: int) -> int:
        data = wds.WebDataset(urls, shardshuffle=100, seed=epoch).shuffle(1024).map(decode)
        return count_rows(torch.stack([x for x, _ in part]) for part in _parts(iter(data)))

    return read


def litdata(rows: Rows, folder: Path) -> Callable[[int], int]:
    """Chunks of tensors, its own loader in this process."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=SHARD_BYTES)
    for idx, (x_CHW, label) in enumerate(zip(rows.half_NCHW, rows.labels, strict=True)):
        writer[idx] = {"x": torch.from_numpy(x_CHW), "y": int(label)}
    writer.done()
    writer.merge(1)
    loader = StreamingDataLoader(
        StreamingDataset(str(folder), shuffle=True, drop_last=False), batch_size=BATCH, num_workers=0
    )
    return lambda _: count_rows(batch["x"] for batch in loader)


def mosaicml(rows: Rows, folder: Path) -> Callable[[int], int]:
    """MDS shards, torch's loader in this process."""
    from streaming import MDSWriter, StreamingDataset

    sides = ",".join(str(size) for size in rows.x_NCHW.shape[1:])
    columns = {"x": f"ndarray:float16:{sides}", "y": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as sink:
        for x_CHW, label in zip(rows.half_NCHW, rows.labels, strict=True):
            sink.write({"x": x_CHW, "y": int(label)})
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    return lambda _: count_rows(batch["x"] for batch in loader)


PEERS = {"webdataset": webdataset, "litdata": litdata, "mosaicml-streaming": mosaicml}


def peers(rows: Rows, folder: Path, limit: str) -> list[Format | Rate]:
    """What other libraries make of the same tensors on the local disk, float16 without a codec."""
    found: list[Format | Rate] = []
    for name, store in PEERS.items():
        try:
            title = f"{name} {version(name)}, local: float16"
        except PackageNotFoundError:
            found.append(Rate(name=name, limit=limit, note=NOT_INSTALLED))
            continue
        read = store(rows, folder / name)
        found.append(Format(name=title, limit=limit, stored_bytes=rows.logical_bytes, read=read))
    return found


def measure(formats: Sequence[Format], rows: Rows, repeats: int) -> list[Rate]:
    """Reads every format once, and then all of them `repeats` times in turn.

    Raises:
        RuntimeError: a format did not give every row.
    """
    first = {each.name: _timed(each, 0, len(rows.labels)) for each in formats}
    seconds: dict[str, list[float]] = {each.name: [] for each in formats}
    for epoch in range(1, repeats + 1):
        for each in formats:
            seconds[each.name].append(_timed(each, epoch, len(rows.labels)))
    of = {each.name: [each.stored_bytes / 1e6 / taken for taken in seconds[each.name]] for each in formats}
    return [
        Rate(
            name=each.name,
            limit=each.limit,
            stored_mb_s=statistics.median(of[each.name]),
            spread=(min(of[each.name]), max(of[each.name])),
            logical_mb_s=rows.logical_bytes / 1e6 / statistics.median(seconds[each.name]),
            first_mb_s=each.stored_bytes / 1e6 / first[each.name],
            of_limit=_ratio(of[each.name], of.get(each.limit)),
        )
        for each in formats
    ]


def _ratio(own: Sequence[float], limit: Sequence[float] | None) -> float | None:
    return statistics.median(a / b for a, b in zip(own, limit, strict=True)) if limit else None


def _timed(each: Format, epoch: int, num_rows: int) -> float:
    start = time.perf_counter()
    got = each.read(epoch)
    seconds = time.perf_counter() - start
    if got != num_rows:
        raise RuntimeError(f"{each.name}: got {got} rows, want {num_rows}")
    return seconds


def _parts(samples: Iterator[tuple[torch.Tensor, int]]) -> Iterator[list[tuple[torch.Tensor, int]]]:
    while part := list(islice(samples, BATCH)):
        yield part


def render_table(rates: Sequence[Rate]) -> str:
    """Formats one row per format as Markdown."""
    lines = [
        "| format | stored MB/s | smallest - largest | as float16, MB/s | first epoch, stored MB/s | of its limit |",
        "|---|---|---|---|---|---|",
    ]
    for rate in rates:
        if rate.stored_mb_s is None:
            lines.append(f"| {rate.name} | {rate.note} | | | | |")
            continue
        share = "" if rate.of_limit is None else f"{rate.of_limit:.0%}"
        spread = f"{rate.spread[0]:,.0f} - {rate.spread[1]:,.0f}"
        numbers = f"{rate.stored_mb_s:,.0f} | {spread} | {rate.logical_mb_s:,.0f} | {rate.first_mb_s:,.0f}"
        lines.append(f"| {rate.name} | {numbers} | {share} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="images: whatever nf-pipeline reads")
    parser.add_argument("--image-size", type=int, default=32, help="pixels on both sides")
    parser.add_argument("--s3", help="s3://bucket/prefix to write to and read from as well")
    parser.add_argument("--rows", type=int, default=8192, help="samples")
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
    limit = formats[0].name
    if given.s3:
        remote = open_store(given.s3)
        formats += [each for dtype in ("float16", "uint8") for each in ours(remote, rows, dtype, "none", "S3")]
    others = peers(rows, folder, limit)
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
