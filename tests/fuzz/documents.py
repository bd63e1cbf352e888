"""A small run whose documents are all there, made by hand: nothing is trained."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nf_pipeline.config import RunConfig, validate_config
from nf_pipeline.driver.run_record import open_run, plan_record
from nf_pipeline.events import EpochDone, Note, Publishing, StageDone, StageFailed, StageSkipped, StageStarted
from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, commit_manifest
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec
from nf_pipeline.storage.store import open_store

RUN = "small"
SPEC = TensorSpec("uint8", (1, 4, 4))
STORED_SPEC = TensorSpec("float16", (3, 2, 2), sample=SPEC)
EVENTS = (
    StageStarted(stage="ingest", attempt="a", worker="host:1"),
    StageDone(stage="ingest", result={"num_classes": 2}, seconds=1.5),
    StageSkipped(stage="plan", note="finished before"),
    StageStarted(stage="block-000", attempt="b", worker="host:1", resumed_epochs=1, round_idx=0, num_rounds=1),
    EpochDone(
        stage="block-000",
        epoch=1,
        num_epochs=2,
        losses=[0.5, 0.25],
        val_accuracies=[0.5, 1.0],
        images_per_s=10.0,
        loader_wait_s=0.1,
        peak_bytes=1000,
    ),
    Publishing(stage="block-000", round_idx=0),
    Note(stage="block-000", text="a note", level="warning"),
    StageFailed(stage="block-000", attempt="b", error="WorkerLost", text="gone"),
)


@dataclass(frozen=True, repr=False)
class SmallRun:
    """Where the run is, and what its documents say."""

    folder: Path
    plan: dict[str, Any]
    ingest: dict[str, Any]
    record: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def uri(self) -> str:
        """STORE/NAME."""
        return str(self.folder / RUN)

    def write(self, name: str, data: bytes) -> None:
        """Replaces an object of the run."""
        (self.folder / RUN / name).write_bytes(data)


def small_plan() -> Plan:
    """Three layers in two units and blocks."""
    layers = tuple(
        LayerSpec(layer_idx=idx, name=f"conv{idx}", out_shape=(8, 4, 4), params=10, flops=100) for idx in range(3)
    )
    units = tuple(
        UnitProfile(
            unit_idx=idx,
            start=start,
            stop=stop,
            bytes_per_sample=7,
            constant_bytes=100,
            resident_bytes=50,
            head_params=5,
            head_flops=9,
        )
        for idx, (start, stop) in enumerate([(0, 2), (2, 3)])
    )
    blocks = tuple(
        BlockPlan(
            block_idx=idx,
            units=(idx, idx + 1),
            layers=layers_of,
            batch_size=4,
            budget_bytes=2**26,
            predicted_peak_bytes=200,
            shard_bytes=100,
            reason="fits",
        )
        for idx, layers_of in enumerate([(0, 2), (2, 3)])
    )
    return Plan(
        model="convnet",
        target=TargetSpec(size=2),
        inputs=InputSpec(shape=(1, 4, 4)),
        budget_bytes=1000,
        layers=layers,
        units=units,
        blocks=blocks,
        params_full=40,
        flops_full=400,
        profile_s=0.5,
        device="cpu",
    )


def make_run(folder: Path) -> SmallRun:
    """Writes run.json, plan.json, events.jsonl and a committed ingest."""
    store, layout = open_store(str(folder)), RunLayout(RUN)
    config = validate_config({"run": RUN, "memory": {"budget_bytes": 1000}, "storage": {"uri": str(folder)}})
    config = open_run(store, layout, config, default_threads=1)
    ingest = _commit_ingest(store, layout, config)
    plan = plan_record(config, "f" * 16, "cpu", small_plan().to_json())
    from nf_pipeline.storage.sealed import seal, unseal

    store.put(layout.plan_json, seal(plan))
    events = [event.to_json() for event in EVENTS]
    store.put(layout.events_jsonl, b"".join(json.dumps(event).encode() + b"\n" for event in events))
    record = unseal(store.get(layout.run_json))
    return SmallRun(folder=folder, plan=json.loads(json.dumps(plan)), ingest=ingest, record=record, events=events)


def _commit_ingest(store: Any, layout: RunLayout, config: RunConfig) -> dict[str, Any]:
    shards = {}
    for split in ("train", "val"):
        make_key = partial(layout.ingest_shard, layout.ingest_attempt("a"), split)
        with ShardWriter(store, make_key, SPEC, 2**20) as writer:
            numbers = np.arange(6)
            writer.append(np.zeros((6, SPEC.nbytes), np.uint8), numbers % 2, numbers)
            shards[split] = tuple(writer.close())
    facts = {
        "dataset": "d",
        "inputs": asdict(InputSpec(shape=(1, 4, 4), mean=(127.5,), std=(63.75,))),
        "target": asdict(TargetSpec(size=2)),
        "class_names": ["a", "b"],
        "split_rows": {"train": 6, "val": 6},
        "num_skipped": 0,
        "skipped": [],
        "source": "digits",
    }
    manifest = StageManifest(stage="ingest", fingerprint="f", attempt="a", spec=SPEC, shards=shards, facts=facts)
    commit_manifest(store, layout.ingest_manifest, manifest)
    return manifest.to_json()


def sample_manifest() -> dict[str, Any]:
    """A block's manifest with everything in it."""
    validated = {"val_correct": [1, 2], "val_errors": [0.5]}
    info = {"key": "small/blocks/000/attempt-b/x", "num_bytes": 10, "checksum": "sha256:0"}
    return {
        **StageManifest(stage="block-000", fingerprint="f", attempt="b", spec=STORED_SPEC).to_json(),
        "shards": {"train": [{**info, "num_rows": 3}], "val": []},
        "weights": ObjectInfo(**info).__dict__,
        "objects": [info],
        "facts": {"train_s": 1.0, "num_val": 3, **validated, "checkpoint": {"epoch": 1}},
    }
