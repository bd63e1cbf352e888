"""Stage 0: images or tensors of any source -> shards of the splits train, val and test, and a manifest.

Labels are read and checked first, then splits are cut, then every wanted image is read, decoded and written
once, in an order that the seed decides. The shards of the test split hold no labels: these are an object of their
own, which is not read before an exit is chosen. Memory does not grow with the data set (8 bytes of label for each
row, or 4 for each value to predict, aside, and for those of the test split as much again and 8 more). A committed
ingest is a snapshot: nothing here asks whether the data has changed since.
Knows nothing of models. Entry: `ingest`; `ingest_fingerprint` records what it was made from.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nf_pipeline.config import RunConfig, fingerprint_of
from nf_pipeline.data.base import SPLITS, Source, Split
from nf_pipeline.data.channel_statistics import FloatStatistics, Statistics, new_statistics
from nf_pipeline.data.decode import DecodedBatch, decode_stream
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.data.splits import TEST, TRAIN, UNUSED
from nf_pipeline.data.survey import Survey, survey
from nf_pipeline.errors import DataError
from nf_pipeline.events import Event, Note, Progress, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, check_stored, commit_manifest, store_object
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store

STAGE = "ingest"
INGEST_VERSION = 3

_REPORT_S = 0.5


def ingest_fingerprint(cfg: RunConfig, source: Source) -> str:
    """Hashes all that decides the ingested shards: the data's own facts, its settings and the seed.

    The path is not part of it: data that moved is the same data.
    """
    return ingest_fingerprint_of(cfg, source_fingerprint(source))


def source_fingerprint(source: Source) -> str:
    """Hashes the data's own facts."""
    return fingerprint_of(source.describe())


def ingest_fingerprint_of(cfg: RunConfig, source: str) -> str:
    """Hashes what decides the ingested shards, for who has no data any more: see `ingest_fingerprint`.

    Args:
        cfg: sections data, storage and train.seed are used.
        source: `source_fingerprint` of the data, as the manifest's facts hold it.
    """
    settings = cfg.data.model_dump(exclude={"source", "decode_threads"})
    return fingerprint_of(
        {
            "ingest_version": INGEST_VERSION,
            "source": source,
            "data": settings,
            "seed": cfg.train.seed,
            "shard_bytes": cfg.storage.shard_bytes,
        }
    )


def ingest(store: Store, layout: RunLayout, cfg: RunConfig, attempt: str) -> Iterator[Event]:
    """Runs the stage; its shards count from the manifest on, which is written last.

    The manifest's facts: dataset, inputs (`InputSpec`), target (`TargetSpec`), class_names ([] of values),
    split_rows, num_skipped, skipped (the first 100), source, source_fingerprint.

    Args:
        store: of the run.
        layout: its keys.
        cfg: sections data, storage and train.seed are used.
        attempt: id; the shards live under it.

    Raises:
        DataError: the data cannot be used; names file, row and column.
        StorageError: data or store cannot be reached.
        AlreadyExists: another attempt committed first.
        WorkerLost: this attempt's shards are no longer there.
    """
    started_s = time.monotonic()
    yield StageStarted(stage=STAGE, attempt=attempt, worker=worker_name())
    job = survey(cfg)
    written = _Written(new_statistics(job.inputs), FloatStatistics(job.target.size))
    spec = TensorSpec(job.inputs.dtype, job.inputs.shape, label_values=job.target.label_values)
    yield from _write(store, layout, job, spec, attempt, written)
    _check_written(job, written)
    if job.skipped.num_images:
        yield Note(stage=STAGE, level="warning", text=job.skipped.summary())
    facts = _facts(job, written)
    labels_key = layout.ingest_labels(layout.ingest_attempt(attempt))
    manifest = StageManifest(
        stage=STAGE,
        fingerprint=ingest_fingerprint(cfg, job.source),
        attempt=attempt,
        spec=spec,
        shards=written.shards,
        objects=(store_object(store, labels_key, written.held_out.encode()),),
        facts=facts,
    )
    check_stored(store, manifest)
    commit_manifest(store, layout.ingest_manifest, manifest)
    yield StageDone(stage=STAGE, result=facts, seconds=time.monotonic() - started_s)


@dataclass
class _Written:
    inputs: Statistics | None
    target: FloatStatistics
    largest_token: int = 0
    shards: dict[str, tuple[ShardInfo, ...]] = field(default_factory=dict)
    class_rows: dict[Split, np.ndarray] = field(default_factory=dict)
    held_out: HeldOutLabels = field(default_factory=HeldOutLabels)

    def count(self, split: Split, strata: np.ndarray) -> None:
        """Counts rows of a split, by class where there are classes."""
        self.class_rows[split] += np.bincount(strata, minlength=len(self.class_rows[split]))

    def measure(self, samples_N: np.ndarray, labels: np.ndarray) -> None:
        """Takes rows of train into the statistics."""
        if self.inputs is not None:
            self.inputs.add(samples_N)
        if labels.ndim == 2:
            self.target.add(labels)


def _write(
    store: Store, layout: RunLayout, job: Survey, spec: TensorSpec, attempt: str, written: _Written
) -> Iterator[Event]:
    prefix = layout.ingest_attempt(attempt)
    shard_bytes = job.cfg.storage.shard_bytes
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                # One upload at a time keeps three writers within six buffers; decoding is the slower part.
                ShardWriter(store, _make_key(layout, prefix, split), spec, shard_bytes, upload_threads=1)
            )
            for split in SPLITS
        ]
        yield from _fill(job, writers, written)
        written.shards = {split: tuple(writer.close()) for split, writer in zip(SPLITS, writers, strict=True)}


def _make_key(layout: RunLayout, prefix: str, split: str) -> Any:
    return lambda shard_idx: layout.ingest_shard(prefix, split, shard_idx)


def _fill(job: Survey, writers: list[ShardWriter], written: _Written) -> Iterator[Progress]:
    written.class_rows = {split: np.zeros(job.labels.num_strata, np.int64) for split in SPLITS}
    started_s = reported_s = time.monotonic()
    done, total = 0, job.num_images
    for split, batch in _decoded(job):
        _append(job, split, batch, writers, written)
        done += len(batch.rows) + len(batch.bad)
        now_s = time.monotonic()
        if now_s - reported_s > _REPORT_S or done == total:
            reported_s = now_s
            rate = done / max(now_s - started_s, 1e-9)
            yield Progress(stage=STAGE, phase="read", done=done, total=total, images_per_s=rate)


def _decoded(job: Survey) -> Iterator[tuple[Split, DecodedBatch]]:
    data = job.cfg.data
    for split in job.source.splits:

        def where(row: int, split: Split = split) -> str:
            return job.source.where(split, row, "image")

        images = job.source.read(split, job.codes[split] != UNUSED, job.cfg.train.seed)
        for batch in decode_stream(
            images,
            inputs=job.inputs,
            image_size=data.image_size,
            threads=data.decode_threads,
            where=where,
        ):
            for row, reason in batch.bad:
                job.skipped.add(where(row), reason)
            yield split, batch


def _append(
    job: Survey, source_split: Split, batch: DecodedBatch, writers: list[ShardWriter], written: _Written
) -> None:
    labels, strata = (by[source_split][batch.rows] for by in (job.labels.by_split, job.labels.strata))
    codes = job.codes[source_split][batch.rows]
    sample_ids = batch.rows + job.first_sample_id(source_split)
    for code, (split, writer) in enumerate(zip(SPLITS, writers, strict=True)):
        chosen = codes == code
        if not chosen.any():
            continue
        samples_N, stored_labels = batch.images[chosen], labels[chosen]
        if code == TEST:
            stored_labels = written.held_out.hold_back(labels[chosen], sample_ids[chosen])
        writer.append(samples_N.reshape(len(samples_N), -1).view(np.uint8), stored_labels, sample_ids[chosen])
        written.count(split, strata[chosen])
        if code == TRAIN:
            written.measure(samples_N, labels[chosen])
    if job.inputs.num_tokens and len(batch.images):
        written.largest_token = max(written.largest_token, int(batch.images.max()))


def _check_written(job: Survey, written: _Written) -> None:
    # Only skipped images can leave a gap here: the labels were checked before.
    for split, class_rows in written.class_rows.items():
        if not class_rows.any():
            raise DataError(
                f"{job.source.name}: split {split} is empty: {job.skipped.summary()}",
                "replace the damaged images",
            )
    missing = np.flatnonzero(written.class_rows["train"] == 0)
    if len(missing):
        name = job.labels.class_names[missing[0]]
        raise DataError(
            f"{job.source.name}: class {missing[0]} ({name!r}) has no image left in "
            f"split train: {job.skipped.summary()}",
            "replace the damaged images",
        )


def _measured_inputs(job: Survey, written: _Written) -> InputSpec:
    if written.inputs is None:
        return replace(job.inputs, num_tokens=job.cfg.data.num_tokens or written.largest_token + 1)
    return replace(job.inputs, mean=written.inputs.mean(), std=written.inputs.std())


def _measured_target(job: Survey, written: _Written) -> TargetSpec:
    if job.target.kind == "class":
        return job.target
    return replace(job.target, mean=written.target.mean(), std=written.target.std())


def _facts(job: Survey, written: _Written) -> dict[str, Any]:
    return {
        "dataset": job.source.name,
        "inputs": _measured_inputs(job, written).to_json(),
        "target": _measured_target(job, written).to_json(),
        "class_names": list(job.labels.class_names),
        "split_rows": {split: int(rows.sum()) for split, rows in written.class_rows.items()},
        "num_skipped": job.skipped.num_images,
        "skipped": job.skipped.listed,
        "source": job.cfg.data.source,
        "source_fingerprint": source_fingerprint(job.source),
    }
