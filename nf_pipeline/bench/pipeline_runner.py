"""Trains with this project's pipeline and reads from its events what a baseline measures by itself.

The clock runs from the start of planning to the last block's end: profiling, planning, training, validation,
checkpoints, storing and reading activations. Reading the data set and looking at the test split are left out, as for
every other method. Entries: `run_pipeline`; `plan_ahead` and `hand_plan` let several trainings share one plan.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.images import bytes_per_pass
from nf_pipeline.bench.stopwatch import Spent, Stopwatch
from nf_pipeline.config import RunConfig
from nf_pipeline.documents import parse_json
from nf_pipeline.driver.run import train
from nf_pipeline.driver.run_record import PLAN_RECORD_KEYS, open_run, plan_record
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import Diverged, PlanError, RunInterrupted
from nf_pipeline.events import EpochDone, Event, StageDone, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.sealed import read_sealed, seal
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.tasks import plan_fingerprint

PLAN_STAGE = "plan"
MODEL_STAGE = "model"
_CLOCK_KEY = "clock.json"


def run_pipeline(
    config: RunConfig, *, deadline: Deadline, tell: Callable[[str], None], with_model: bool = True
) -> dict[str, Any] | None:
    """Trains a run whose images are ingested, or goes on with it, as far as the time allows.

    Args:
        config: its store holds nothing but this run.
        tell: gets a line per epoch.
        with_model: False ends before the final model and the test; the result is the best exit's accuracy on the
            validation split and the seconds of training.

    Returns:
        The result; None if time ran out. Then the same call goes on.
    """
    store, stop = open_store(config.storage.uri), StopRequest()
    clock = _RunClock(store, deadline, stop, tell, with_model=with_model)
    try:
        summary = train(config, on_event=clock.add, stop=stop)
    except RunInterrupted:
        if with_model or not clock.is_trained:
            return None
        return {"status": "done", "best_val_accuracy": clock.best, "train_s": sum(clock.epoch_s)}
    except PlanError as error:
        return plan_refused(error)
    except Diverged as error:
        return {"status": "diverged", "error": str(error), "lr": config.train.lr}
    plan = read_sealed(store, RunLayout(config.run).plan_json) or {}
    return _result(config, summary, plan, clock, _moved(store, config, summary, clock))


def plan_refused(error: PlanError) -> dict[str, Any]:
    """Returns the result of a budget with which nothing can be planned."""
    return {"status": "does not fit", "needs_bytes": error.smallest_budget_bytes, "needs": f"layer {error.layer}"}


def plan_ahead(config: RunConfig) -> dict[str, Any]:
    """Plans a run whose images are ingested, and ends it there.

    Returns:
        plan.json.

    Raises:
        PlanError: there is none.
    """
    stop = StopRequest()

    def end(event: Event) -> None:
        if isinstance(event, StageDone) and event.stage == PLAN_STAGE:
            stop.ask()

    store, key = open_store(config.storage.uri), RunLayout(config.run).plan_json
    if read_sealed(store, key) is None:
        try:
            train(config, on_event=end, stop=stop)
        except RunInterrupted:
            if read_sealed(store, key) is None:
                raise
    return read_sealed(store, key) or {}


def hand_plan(planned: dict[str, Any], config: RunConfig) -> None:
    """Gives a run whose images are ingested the plan of another one: it differs in learning rate and epochs."""
    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    if store.size(layout.plan_json) is not None:
        return
    settled = open_run(store, layout, config, config.cluster.num_threads or 1)
    fingerprint = plan_fingerprint(settled, read_ingest(store, layout).content_checksum)
    plan = {name: value for name, value in planned.items() if name not in PLAN_RECORD_KEYS}
    store.create(layout.plan_json, seal(plan_record(settled, fingerprint, planned["placed_on"], plan)))


def planned_epoch_s(planned: dict[str, Any], num_epochs: int) -> float:
    """Returns what the plan says an epoch of all blocks takes; as long as it may where nothing was timed."""
    seconds = [block.get("predicted_s") for block in planned["blocks"]]
    return math.inf if None in seconds else sum(seconds) / num_epochs


class _RunClock:
    """Listens to a run: what was spent when, and how accurate the best exit was then."""

    def __init__(
        self,
        store: Store,
        deadline: Deadline,
        stop: StopRequest,
        tell: Callable[[str], None],
        *,
        with_model: bool,
    ) -> None:
        self._store, self._deadline, self._stop, self._tell = store, deadline, stop, tell
        self._with_model, self.is_trained = with_model, False
        before = parse_json(store.get(_CLOCK_KEY)) if store.size(_CLOCK_KEY) else {}
        self.accuracies: dict[str, list[float]] = before.get("accuracies", {})
        self.curve: list[tuple[float, float]] = before.get("curve", [])
        self.epoch_s: list[float] = before.get("epoch_s", [])
        self.images_per_s: list[float] = before.get("images_per_s", [])
        self.stage_s: dict[str, float] = before.get("stage_s", {})
        self.sessions: int = before.get("sessions", 0) + 1
        self._watch = Stopwatch(Spent(**before.get("spent", {})))
        self._epoch_began = 0.0
        if not before:  # what another process did is found again before anything goes on: that is not counted
            self._watch.go()

    @property
    def spent(self) -> Spent:
        """All processes together, up to the choice of the exit."""
        return self._watch.spent()

    @property
    def best(self) -> float:
        """The highest accuracy of an exit so far; 0.0 before the first epoch."""
        return max((accuracy for exits in self.accuracies.values() for accuracy in exits), default=0.0)

    def add(self, event: Event) -> None:
        """Notes one event."""
        if isinstance(event, StageStarted):
            self._begin(event)
        elif isinstance(event, StageDone):
            self.stage_s[event.stage] = self.stage_s.get(event.stage, 0.0) + event.seconds
            self._save()  # whoever is killed in the next stage's first epoch has spent these seconds all the same
        elif isinstance(event, EpochDone):
            self._end_epoch(event)

    def _begin(self, event: StageStarted) -> None:
        if event.stage == MODEL_STAGE:
            self._watch.stop()
            self._save()
            self.is_trained = True
            if not self._with_model:
                self._stop.ask()
        else:
            self._watch.go()
            self._epoch_began = self.spent.wall_s

    def _end_epoch(self, event: EpochDone) -> None:
        now = self.spent.wall_s
        self.accuracies[event.stage] = event.val_accuracies
        self.curve.append((now, self.best))
        self.epoch_s.append(now - self._epoch_began)
        self.images_per_s.append(event.images_per_s)
        self._tell(
            f"{event.stage} epoch {event.epoch}/{event.num_epochs} | loss {event.losses[-1]:.3f} | "
            f"val {100 * self.best:.1f} % | {event.images_per_s:,.0f} img/s | {now:.0f} s"
        )
        self._save()
        self._epoch_began = now
        if not self._deadline.leaves(self.epoch_s[-1]):
            self._stop.ask()

    def _save(self) -> None:
        document = {
            "spent": asdict(self.spent),
            "accuracies": self.accuracies,
            "curve": self.curve,
            "epoch_s": self.epoch_s,
            "images_per_s": self.images_per_s,
            "stage_s": self.stage_s,
            "sessions": self.sessions,
        }
        self._store.put(_CLOCK_KEY, json.dumps(document).encode())


def _result(
    config: RunConfig, summary: dict[str, Any], plan: dict[str, Any], clock: _RunClock, moved: dict[str, Any]
) -> dict[str, Any]:
    blocks, spent = summary["blocks"], clock.spent
    best = max(exit["val_accuracy"] for exit in summary["exits"])
    # A run that stops early ends with an exit that is there already; what was planned for later blocks never happens.
    curve = [*clock.curve, (spent.wall_s, best)]
    return {
        "status": "done",
        "batch_sizes": [block["batch_size"] for block in blocks],
        "predicted_peak_bytes": max(block["predicted_peak_bytes"] for block in blocks),
        "measured_peak_bytes": max(block["measured_peak_bytes"] for block in blocks),
        "curve": curve,
        "train_s": spent.wall_s,
        **moved,
        "epoch_s": statistics.median(clock.epoch_s),
        "images_per_s": statistics.median(clock.images_per_s),
        "val_accuracy": summary["val_accuracy"],
        "best_val_accuracy": best,
        "test_accuracy": summary["test_accuracy"],
        "params": summary["params_final"],
        "params_full": summary["params_full"],
        "lr": config.train.lr,
        "sessions": clock.sessions,
        "parts": _parts(summary, clock),
        "plan": _planned(plan, blocks),
        "exit_layer": summary["exits"][summary["chosen_exit"]]["layer"],
        "num_exits": len(summary["exits"]),
        "stopped_early": summary["stopped_early"],
    }


def _parts(summary: dict[str, Any], clock: _RunClock) -> dict[str, float]:
    """Divides the seconds: what is left over is the driver's, commits and checks included."""
    blocks = summary["blocks"]
    loading = sum(block["loader_wait_s"] for block in blocks)
    parts = {
        "profiling and planning": clock.stage_s.get("plan", 0.0),
        "training": sum(block["train_s"] for block in blocks) - loading,
        "caching": sum(block["write_s"] for block in blocks),
        "loading": loading,
    }
    return {**parts, "other": max(0.0, clock.spent.wall_s - sum(parts.values()))}


def _planned(plan: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the plan said of the blocks that were trained, beside what they took."""
    planned = plan.get("blocks", [])[: len(blocks)]
    seconds = [block.get("predicted_s") for block in planned]
    return {
        "layers": [block["layers"] for block in blocks],
        "units": [block["units"][1] - block["units"][0] for block in planned],
        "predicted_s": None if None in seconds else sum(seconds),
        "measured_s": sum(block["train_s"] + block["write_s"] for block in blocks),
        "candidates": plan.get("candidates", []),
    }


def _moved(store: Store, config: RunConfig, summary: dict[str, Any], clock: _RunClock) -> dict[str, Any]:
    """Returns CPU seconds and bytes; where other processes train, this one knows only what is stored."""
    stored = sum(size for key, size in store.list(RunLayout(config.run).blocks) if "/activations/" in key)
    if config.cluster.executor != "inline":
        return {"cpu_s": None, "read_bytes": None, "written_bytes": None, "stored_bytes": stored}
    ingest, views = read_ingest(store, RunLayout(config.run)), config.train.views
    num_train, num_val = (ingest.facts["split_rows"][split] for split in ("train", "val"))
    share = (num_train + num_val) / (views * num_train + num_val)
    return {
        "cpu_s": clock.spent.cpu_s,
        "read_bytes": read_bytes(summary["blocks"], bytes_per_pass(ingest), config.train.epochs, share),
        "written_bytes": clock.spent.written_bytes,
        "stored_bytes": stored,
    }


def read_bytes(blocks: Sequence[dict[str, Any]], image_bytes: int, num_epochs: int, view_share: float = 1.0) -> int:
    """Returns the bytes of the shards that all blocks go through.

    Each goes through its source once an epoch, and once more where it stores activations of its own.

    Args:
        blocks: of a summary, in order.
        image_bytes: of the shards of images, train and validation split.
        view_share: part of what a block stores that an epoch reads: one view of several, and the validation split.
    """
    sources = {-1: image_bytes / view_share, **{block["block_idx"]: block["shard_bytes"] for block in blocks}}
    passes = ((block["source_block"], num_epochs * view_share + (block["shard_bytes"] > 0)) for block in blocks)
    return round(sum(sources[source] * times for source, times in passes))
