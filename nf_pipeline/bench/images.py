"""Ingested images: read once per seed, then the same files for every cell.

Entries: `ingest_images`, `share_images`, `bytes_per_pass`.
"""

import contextlib
import os
import shutil
from pathlib import Path

from nf_pipeline.bench.run_config import RUN
from nf_pipeline.config import RunConfig
from nf_pipeline.driver.run_record import open_run
from nf_pipeline.executors.base import load_stage
from nf_pipeline.storage.layout import RunLayout, new_attempt_id
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.tasks import INGEST_STAGE, PrepareTask


def images_folder(work: Path, seed: int) -> Path:
    """Returns where the images of a seed are: the seed draws the validation split."""
    return work / f"images-seed{seed}"


def ingest_images(config: RunConfig) -> StageManifest:
    """Reads the data set into the store of a configuration, unless its images are there.

    Raises:
        DataError: the data cannot be used.
    """
    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    if read_manifest(store, layout.ingest_manifest) is None:
        threads = config.cluster.num_threads or 1
        config = open_run(store, layout, config, threads)
        task = PrepareTask(config=config, attempt=new_attempt_id(), num_threads=threads)
        for _ in load_stage(INGEST_STAGE)(task):
            pass
    return read_ingest(store, layout)


def open_images(folder: Path) -> tuple[Store, StageManifest]:
    """Opens ingested images for reading.

    Raises:
        ObjectMissing: there are none.
    """
    store = open_store(str(folder))
    return store, read_ingest(store, RunLayout(RUN))


def bytes_per_pass(ingest: StageManifest) -> int:
    """Returns the bytes of shards that an epoch goes through: those of the train and the validation split.

    Whether they are read or mapped, from a disk or the page cache: it is what the batches are made of.
    """
    return sum(shard.num_bytes for split in ("train", "val") for shard in ingest.shards.get(split, ()))


def share_images(source: Path, target: Path) -> None:
    """Gives a run in another folder the same images, without a copy where the file system can link."""
    origin = source / RUN / "ingest"
    for path in sorted(origin.rglob("*"), key=lambda path: path.name == "manifest.json"):  # the commit comes last
        goal = target / RUN / "ingest" / path.relative_to(origin)
        if path.is_dir() or goal.exists():
            continue
        goal.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            os.link(path, goal)
            continue
        shutil.copyfile(path, goal)
