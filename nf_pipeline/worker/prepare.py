"""The stages before training, as tasks: ingest the images, profile and plan.

Only planning loads torch, and only when it begins: a process that reads images takes a tenth of the memory.
"""

from collections.abc import Iterator

from nf_pipeline.data.ingest import ingest
from nf_pipeline.events import Event, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.samples import inputs_of, target_of
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.stage_input import open_run_store, read_ingest
from nf_pipeline.worker.tasks import PrepareTask


def ingest_images(task: PrepareTask) -> Iterator[Event]:
    """Reads the data set into uint8 shards; see `nf_pipeline.data.ingest.ingest`."""
    store, layout = open_run_store(task.config)
    yield from ingest(store, layout, task.config, task.attempt)


def make_run_plan(task: PrepareTask) -> Iterator[Event]:
    """Profiles the model on this worker and plans its blocks; StageDone carries the plan as JSON."""
    from nf_pipeline.core.planner import make_plan
    from nf_pipeline.storage.bandwidth import measure_for
    from nf_pipeline.worker.change_time import measure_changes
    from nf_pipeline.worker.runtime import set_threads

    clock = ProgressClock()
    set_threads(task.num_threads)
    yield StageStarted(stage="plan", attempt=task.attempt, worker=worker_name())
    store, layout = open_run_store(task.config)
    facts = read_ingest(store, layout).facts
    plan = make_plan(
        task.config,
        inputs=inputs_of(facts),
        target=target_of(facts),
        split_rows=facts["split_rows"],
        worker_memory_bytes=task.worker_memory_bytes,
        rates=measure_for(task.config, store, layout.attempt_prefix("plan", task.attempt)),
        change_s=measure_changes(task.config.train, inputs_of(facts)),
    )
    yield StageDone(stage="plan", result=plan.to_json(), seconds=clock.seconds)
