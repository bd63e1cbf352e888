"""The stages before training, as tasks: ingest the images, profile and plan."""

import time
from collections.abc import Iterator

from nf_pipeline.core.planner import make_plan
from nf_pipeline.data.ingest import ingest
from nf_pipeline.events import Event, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store
from nf_pipeline.worker.runtime import set_threads
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.tasks import PrepareTask


def ingest_images(task: PrepareTask) -> Iterator[Event]:
    """Reads the data set into uint8 shards; see `nf_pipeline.data.ingest.ingest`."""
    store = open_store(task.config.storage.uri)
    yield from ingest(store, RunLayout(task.config.run), task.config, task.attempt)


def make_run_plan(task: PrepareTask) -> Iterator[Event]:
    """Profiles the model on this worker and plans its blocks; StageDone carries the plan as JSON."""
    began = time.monotonic()
    set_threads(task.num_threads)
    yield StageStarted(stage="plan", attempt=task.attempt, worker=worker_name())
    facts = read_ingest(open_store(task.config.storage.uri), RunLayout(task.config.run)).facts
    plan = make_plan(
        task.config,
        image_shape=tuple(facts["image_shape"]),
        num_classes=facts["num_classes"],
        split_rows=facts["split_rows"],
    )
    yield StageDone(stage="plan", result=plan.to_json(), seconds=time.monotonic() - began)
