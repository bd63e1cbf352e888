"""The last stage: choose the exit on the validation split, build the final model, look at the test split once.

The choice needs no forward pass: every block counted its heads' correct validation samples. The test split is
read after the choice and only by the chosen model. Entry: `assemble_model`.
"""

import json
from collections.abc import Generator, Iterator
from typing import Any

import safetensors.torch
import torch

from nf_pipeline.config import RunConfig
from nf_pipeline.core.exit_model import ExitModel
from nf_pipeline.core.exits import ExitCandidate, choose_exit
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units
from nf_pipeline.core.models import build_model
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.errors import AlreadyExists, ObjectCorrupt
from nf_pipeline.events import Event, Progress, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.model_files import ModelCard
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, checksum_of, commit_manifest, read_object, store_object
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.checkpoint import unpack_units
from nf_pipeline.worker.model_card import render_model_card
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.runtime import cap_device_memory, set_threads
from nf_pipeline.worker.stage_input import open_run_store, read_block, read_ingest
from nf_pipeline.worker.tasks import AssembleTask, assemble_fingerprint

STAGE = "model"


def assemble_model(task: AssembleTask) -> Iterator[Event]:
    """Chooses the exit, writes the final model and commits it.

    Yields:
        StageStarted, Progress, and StageDone with `exits`, `chosen_exit`, `chosen_reason`, `val_accuracy`,
        `test_accuracy`, `params_full`, `params_final` and `params_final_no_head`.

    Raises:
        StorageError: a block's manifest or weights are missing or corrupt.
    """
    clock = ProgressClock()
    set_threads(task.num_threads)
    store, layout = open_run_store(task.config)
    yield StageStarted(stage=STAGE, attempt=task.attempt, worker=worker_name())
    blocks = [read_block(store, layout, idx) for idx in range(task.num_blocks)]
    ingest = read_ingest(store, layout)
    exits = list_exits(task.plan, [block.facts for block in blocks])
    chosen = choose_exit(exits, task.config.exits.tolerance, task.config.exits.confidence)
    units = load_units(store, task.config, task.plan, blocks, chosen.index + 1)
    model = ExitModel(units, ingest.facts["mean"], ingest.facts["std"]).eval()
    test_accuracy = None
    if ingest.shards.get("test"):
        test_accuracy = yield from _test(store, ingest, model, task)
    result = _result(task, exits, chosen.index, chosen.reason, model, test_accuracy)
    _commit(store, layout, task, ingest, blocks, model, result)
    yield StageDone(stage=STAGE, result=result, seconds=clock.seconds)


def list_exits(plan: Plan, block_facts: list[dict[str, Any]]) -> list[ExitCandidate]:
    """Turns what the trained blocks counted into one candidate per unit, shallowest first.

    Parameters and FLOPs are those of the model that ends at the exit, its head included.
    """
    correct = [count for facts in block_facts for count in facts["val_correct"]]
    exits = []
    for unit, num_correct in zip(plan.units[: len(correct)], correct, strict=True):
        layers = plan.layers[: unit.stop]
        exits.append(
            ExitCandidate(
                layer_idx=unit.stop - 1,
                layer=plan.layers[unit.stop - 1].name,
                val_accuracy=num_correct / block_facts[0]["num_val"],
                num_val=block_facts[0]["num_val"],
                params=sum(layer.params for layer in layers) + unit.head_params,
                flops=sum(layer.flops for layer in layers) + unit.head_flops,
            )
        )
    return exits


def load_units(
    store: Store, config: RunConfig, plan: Plan, blocks: list[StageManifest], num_units: int
) -> list[LocalUnit]:
    """Builds the first `num_units` units and fills in the blocks' trained weights.

    Raises:
        ObjectCorrupt: a block's weights are not those that its manifest names.
    """
    model = build_model(plan.model, image_shape=plan.image_shape, num_classes=plan.num_classes, seed=0)
    cut_model, first_units = cut(model, plan.image_shape), range(num_units)
    units = build_units(cut_model, config.train.head, plan.spans, plan.num_classes, 0, units=first_units)
    for block, manifest in zip(plan.blocks, blocks, strict=False):
        first, stop = block.units[0], min(block.units[1], num_units)
        if first < stop:
            tensors = read_tensors(read_weights(store, manifest), f"{manifest.stage} at {store.uri}")
            unpack_units(units[first:stop], first, tensors)
    return units


def read_weights(store: Store, manifest: StageManifest) -> bytes:
    """Reads a stage's weights and checks them against its manifest."""
    if manifest.weights is None:
        raise ObjectCorrupt(f"{manifest.stage}: its manifest names no weights", store.uri)
    return read_object(store, manifest.weights)


@torch.no_grad()
def _test(
    store: Store, ingest: StageManifest, model: ExitModel, task: AssembleTask
) -> Generator[Progress, None, float]:
    device = resolve_device(task.config.train.device)
    cap_device_memory(device, None)
    model.to(device)
    # What every block could train with, the final model can run with.
    batch_size = min(block.batch_size for block in task.plan.blocks[: task.num_blocks])
    reader = ShardReader(store, ingest.shards["test"], ingest.spec, batch_size=batch_size)
    clock, correct, done = ProgressClock(), 0, 0
    for batch in reader.batches(seed=0, epoch=0, shuffle=False):
        pixels_NCHW = torch.from_numpy(batch.tensors).view(-1, *ingest.spec.shape).to(device)
        labels_N = torch.from_numpy(batch.labels).to(device)
        correct += int((model(pixels_NCHW).argmax(dim=1) == labels_N).sum())
        done += len(batch.labels)
        if clock.is_due():
            rate = clock.rate(done)
            yield Progress(stage=STAGE, phase="validate", done=done, total=reader.num_rows, images_per_s=rate)
    model.cpu()
    return correct / reader.num_rows


def _result(
    task: AssembleTask,
    exits: list[ExitCandidate],
    chosen: int,
    reason: str,
    model: ExitModel,
    test_accuracy: float | None,
) -> dict[str, Any]:
    confidence = task.config.exits.confidence
    return {
        "exits": [
            {
                "layer_idx": exit.layer_idx,
                "layer": exit.layer,
                "val_accuracy": exit.val_accuracy,
                "val_interval": list(exit.interval(confidence)),
                "params": exit.params,
                "flops": exit.flops,
            }
            for exit in exits
        ],
        "chosen_exit": chosen,
        "chosen_reason": reason,
        "val_accuracy": exits[chosen].val_accuracy,
        "test_accuracy": test_accuracy,
        "params_full": task.plan.params_full,
        "params_final": sum(p.numel() for p in model.parameters()),
        "params_final_no_head": sum(p.numel() for p in model.layers.parameters()),
    }


def _commit(
    store: Store,
    layout: RunLayout,
    task: AssembleTask,
    ingest: StageManifest,
    blocks: list[StageManifest],
    model: ExitModel,
    result: dict[str, Any],
) -> None:
    weights = safetensors.torch.save({name: t.contiguous() for name, t in model.state_dict().items()})
    card = _card(task, ingest, result, checksum_of(weights))
    files = {
        layout.model_weights: weights,
        layout.model_card: render_model_card(card, result, ingest.facts).encode(),
        layout.model_json: json.dumps(card.to_json(), indent=2).encode(),
    }
    if store.size(layout.model_manifest) is not None:
        # These objects have no attempt in their keys: who is late must not overwrite what the first one committed.
        raise AlreadyExists(f"object {layout.model_manifest} exists already", store.uri)
    stored, *others = (store_object(store, key, data) for key, data in files.items())
    checksums = [block.content_checksum for block in blocks]
    manifest = StageManifest(
        stage=STAGE,
        fingerprint=assemble_fingerprint(task.config, checksums),
        input_checksum=checksums[-1],
        attempt=task.attempt,
        weights=stored,
        objects=tuple(others),
        facts=result,
    )
    commit_manifest(store, layout.model_manifest, manifest)


def _card(task: AssembleTask, ingest: StageManifest, result: dict[str, Any], checksum: str) -> ModelCard:
    chosen = result["exits"][result["chosen_exit"]]
    return ModelCard(
        model=task.plan.model,
        image_shape=task.plan.image_shape,
        num_classes=task.plan.num_classes,
        class_names=tuple(ingest.facts["class_names"]),
        head=task.plan.units[result["chosen_exit"]].head or task.config.train.head,
        num_layers=chosen["layer_idx"] + 1,
        mean=tuple(ingest.facts["mean"]),
        std=tuple(ingest.facts["std"]),
        exit_layer_idx=chosen["layer_idx"],
        exit_layer=chosen["layer"],
        val_accuracy=result["val_accuracy"],
        test_accuracy=result["test_accuracy"],
        params=result["params_final"],
        params_full=result["params_full"],
        memory_budget_bytes=task.plan.budget_bytes,
        weights_checksum=checksum,
    )
