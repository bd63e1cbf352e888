"""A run's events as Ray metrics: the Ray node beside the driver exports them to Prometheus as `ray_nf_pipeline_...`.

Knows events and nothing of how stages run, and starts no Ray: the process must have joined one. Entry: `RunMetrics`.
"""

from ray.util.metrics import Counter, Gauge

from nf_pipeline.events import EpochDone, Event, Progress, StageDone, StageFailed

EXPORTED_PREFIX = "ray_"
"""What Ray puts before every name when it exports it."""

TAGS = ("run", "block")

GAUGES = {
    "nf_pipeline_loss": "Newest training loss of the block's last unit.",
    "nf_pipeline_images_per_s": "Images that the stage reads or trains on per second.",
    "nf_pipeline_peak_bytes": "Largest number of device bytes measured since the block's attempt began.",
    "nf_pipeline_epoch": "Epoch that the block is in, 1-based.",
    "nf_pipeline_val_accuracy": "Accuracy of the block's last unit on the validation split, 0 to 1, of classes.",
    "nf_pipeline_val_error": "Part of the variance that the block's last unit leaves on the validation split.",
}
COUNTERS = {
    "nf_pipeline_shard_bytes_total": "Bytes of activations that committed stages have written.",
    "nf_pipeline_loader_wait_s_total": "Seconds that training has waited for data.",
    "nf_pipeline_attempts_failed_total": "Attempts that ended with an error.",
}

# Validation and writing are passes of another kind: their rates would make the curve jump.
_RATED_PHASES = ("read", "train")


class RunMetrics:
    """Gauges and counters of one run, tagged `run` and `block`; `block` is the stage: "block-000", "ingest", ..."""

    def __init__(self, run: str) -> None:
        """Registers the metrics.

        Args:
            run: name of the run, the value of the tag of that name.
        """
        self._run = run
        self._gauges = {name: Gauge(name, description=text, tag_keys=TAGS) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, description=text, tag_keys=TAGS) for name, text in COUNTERS.items()}

    def observe(self, event: Event) -> None:
        """Takes over the numbers of one event; events without numbers change nothing."""
        if isinstance(event, Progress):
            self._observe_progress(event)
        elif isinstance(event, EpochDone):
            self._observe_epoch(event)
        elif isinstance(event, StageDone):
            self._add("nf_pipeline_shard_bytes_total", event.stage, event.result.get("shard_bytes", 0))
        elif isinstance(event, StageFailed):
            self._add("nf_pipeline_attempts_failed_total", event.stage, 1)

    def _observe_progress(self, event: Progress) -> None:
        if event.phase in _RATED_PHASES:
            self._set("nf_pipeline_images_per_s", event.stage, event.images_per_s)
        self._set("nf_pipeline_loss", event.stage, event.loss)
        self._set("nf_pipeline_peak_bytes", event.stage, event.peak_bytes)
        self._set("nf_pipeline_epoch", event.stage, event.epoch or None)

    def _observe_epoch(self, event: EpochDone) -> None:
        self._set("nf_pipeline_images_per_s", event.stage, event.images_per_s)
        self._set("nf_pipeline_loss", event.stage, event.losses[-1])
        self._set("nf_pipeline_peak_bytes", event.stage, event.peak_bytes)
        self._set("nf_pipeline_epoch", event.stage, event.epoch)
        self._set("nf_pipeline_val_accuracy", event.stage, next(reversed(event.val_accuracies), None))
        self._set("nf_pipeline_val_error", event.stage, next(reversed(event.val_errors), None))
        self._add("nf_pipeline_loader_wait_s_total", event.stage, event.loader_wait_s)

    def _set(self, name: str, stage: str, value: float | None) -> None:
        if value is not None:
            self._gauges[name].set(value, tags={"run": self._run, "block": stage})

    def _add(self, name: str, stage: str, amount: float) -> None:
        if amount > 0:  # Ray's counters refuse an increment of nothing
            self._counters[name].inc(amount, tags={"run": self._run, "block": stage})
