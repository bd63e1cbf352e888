"""The last stage: choose the exit on the validation split, build the final model, look at the test split once.

Everything that the validation split decides is committed as one `Choice` before the labels of the test split are
read; a stage that died in between goes on with that choice. Entry: `assemble_model`.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import safetensors.torch
from torch import nn

from nf_pipeline.config import RunConfig
from nf_pipeline.core.exit_model import ExitModel
from nf_pipeline.core.exits import choose_exit
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units
from nf_pipeline.core.models import build_model
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.errors import AlreadyExists, Diverged, ObjectCorrupt
from nf_pipeline.events import Event, Note, Progress, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.model_files import EarlyExitCard, KeptExit, ModelCard
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, checksum_of, commit_manifest, read_object, store_object
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.checkpoint import unpack_units
from nf_pipeline.worker.choice import (
    Choice,
    CommittedChoice,
    choice_objects,
    commit_choice,
    find_choice,
    read_test_labels,
)
from nf_pipeline.worker.decide import calibrated, exit_costs, list_exits, plan_early_exits
from nf_pipeline.worker.exit_pass import ExitPass, LadderOfExits, LookAtTest
from nf_pipeline.worker.model_card import render_model_card
from nf_pipeline.worker.model_result import describe_result
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.runtime import cap_device_memory, set_threads
from nf_pipeline.worker.stage_input import open_run_store, read_block, read_ingest
from nf_pipeline.worker.tasks import AssembleTask, assemble_fingerprint

STAGE = "model"


def assemble_model(task: AssembleTask) -> Iterator[Event]:
    """Chooses the exit, writes the final model and commits it.

    Yields:
        StageStarted, Progress, a Note if the test split was looked at before, and StageDone with what
        `describe_result` returns and the final model's parameters.

    Raises:
        Diverged: the chosen exit returns what is no number.
        StorageError: a block's manifest or weights, or the choice, are missing or corrupt.
    """
    clock = ProgressClock()
    set_threads(task.num_threads)
    assembly = _Assembly(task, *open_run_store(task.config))
    yield StageStarted(stage=STAGE, attempt=task.attempt, worker=worker_name())
    made = yield from assembly.choose()
    if made.num_others:
        text = f"the test split is read again, for choice {made.num_test_reads}: what can be chosen has changed"
        yield Note(stage=STAGE, level="warning", text=text)
    look = yield from assembly.look_at_test(made)
    result = assembly.commit(made, look)
    yield StageDone(stage=STAGE, result=result, seconds=clock.seconds)


def load_units(
    store: Store, config: RunConfig, plan: Plan, blocks: list[StageManifest], num_units: int
) -> list[LocalUnit]:
    """Builds the first `num_units` units and fills in the blocks' trained weights.

    Raises:
        ObjectCorrupt: a block's weights are not those that its manifest names.
    """
    model = build_model(plan.model, inputs=plan.inputs, num_outputs=plan.target.size, seed=0)
    cut_model, first_units = cut(model, plan.inputs), range(num_units)
    train = config.train
    built = build_units(cut_model, train.head, plan.spans, plan.target, 0, units=first_units, train=train)
    units = [unit.trained() for unit in built]
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


class _Assembly:
    """One attempt at the stage."""

    def __init__(self, task: AssembleTask, store: Store, layout: RunLayout) -> None:
        self._task = task
        self._store = store
        self._layout = layout
        self._blocks = [read_block(store, layout, idx) for idx in range(task.num_blocks)]
        self._ingest = read_ingest(store, layout)
        self._exits = list_exits(task.plan, [block.facts for block in self._blocks])
        self._checksums = [block.content_checksum for block in self._blocks]
        self._device = resolve_device(task.config.train.device)
        self._loaded: tuple[int, LadderOfExits] | None = None
        cap_device_memory(self._device, None)

    def choose(self) -> Generator[Progress, None, CommittedChoice]:
        """Decides on the validation split, or finds what an earlier attempt at the same has decided."""
        fingerprint = assemble_fingerprint(self._task.config, self._checksums)
        made = find_choice(self._store, self._layout.model, fingerprint)
        if made is None:
            choice = yield from self._decide(fingerprint)
            made = commit_choice(self._store, self._layout.model, choice)
        self._check(made)
        return made

    def look_at_test(self, made: CommittedChoice) -> Generator[Progress, None, LookAtTest | None]:
        """Runs what was chosen over the test split, whose labels the committed choice opens."""
        if not self._ingest.shards.get("test"):
            return None
        labels = read_test_labels(self._store, self._ingest, self._store, made.key)
        running = self._pass(self._ladder(made.choice.chosen_exit))
        return (yield from running.look(labels, self._task.plan.target, made.choice.temperatures))

    def commit(self, made: CommittedChoice, look: LookAtTest | None) -> dict[str, Any]:
        """Writes the model and the manifest that counts; returns the stage's facts."""
        ladder = self._ladder(made.choice.chosen_exit)
        costs = exit_costs(self._task.plan, len(self._exits))
        result = describe_result(self._task, self._exits, costs, made, look)
        params = sum(parameter.numel() for parameter in ladder.final.parameters())
        head = sum(parameter.numel() for parameter in ladder.final.head.parameters())
        result |= {"params_final": params, "params_final_no_head": params - head}
        if self._store.size(self._layout.model_manifest) is not None:
            # These objects have no attempt in their keys: who is late must not overwrite what the first committed.
            raise AlreadyExists(f"object {self._layout.model_manifest} exists already", self._store.uri)
        stored, *others = (store_object(self._store, *file) for file in self._files(ladder, made, result).items())
        manifest = StageManifest(
            stage=STAGE,
            fingerprint=made.choice.fingerprint,
            input_checksum=self._checksums[-1],
            attempt=self._task.attempt,
            weights=stored,
            objects=(*others, *choice_objects(self._store, self._layout.model)),
            facts=result,
        )
        commit_manifest(self._store, self._layout.model_manifest, manifest)
        return result

    def _decide(self, fingerprint: str) -> Generator[Progress, None, Choice]:
        config = self._task.config.exits
        chosen = choose_exit(self._exits, config.tolerance, config.confidence)
        if not self._exits[chosen.index].results.is_finite:
            raise Diverged(STAGE, "the final model returns what is no number", "lower train.lr")
        calibration = early_exits = None
        if self._has_classes:
            logits, labels_N = yield from self._pass(self._ladder(chosen.index)).logits("val")
            calibration = calibrated(STAGE, logits[-1], labels_N)
        if config.keep == "all":
            costs = exit_costs(self._task.plan, chosen.index + 1)
            early_exits = plan_early_exits(logits, labels_N, costs, calibration.temperature)
        return Choice(
            fingerprint=fingerprint,
            ingest_checksum=self._ingest.content_checksum,
            chosen_exit=chosen.index,
            reason=chosen.reason,
            calibration=calibration,
            early_exits=early_exits,
        )

    @property
    def _has_classes(self) -> bool:
        return self._task.plan.target.kind == "class"

    def _check(self, made: CommittedChoice) -> None:
        """Refuses a choice that is not one for this run.

        Raises:
            ObjectCorrupt: names the fields.
        """
        choice, keeps_all = made.choice, self._task.config.exits.keep == "all"
        fits = (choice.calibration is not None) == self._has_classes and (choice.early_exits is not None) == keeps_all
        if choice.chosen_exit < len(self._exits) and fits:
            return
        got = f"exit {choice.chosen_exit} of {len(self._exits)}, calibration {choice.calibration}"
        early = "no early exits" if choice.early_exits is None else "early exits"
        what = f"{made.key} is damaged: chosen_exit, calibration, early_exits: got {got}, {early}"
        raise ObjectCorrupt(what, self._store.uri, repair_fix(self._store, made.key))

    def _ladder(self, chosen: int) -> LadderOfExits:
        """Loads the chosen model, and the exits before it where they are kept; once."""
        if self._loaded is None or self._loaded[0] != chosen:
            self._loaded = chosen, self._load(chosen)
        return self._loaded[1]

    def _load(self, chosen: int) -> LadderOfExits:
        units = load_units(self._store, self._task.config, self._task.plan, self._blocks, chosen + 1)
        units = [unit.to(self._device).eval() for unit in units]
        plan = self._task.plan
        final = ExitModel(units, plan.inputs, plan.target).to(self._device).eval()
        if self._task.config.exits.keep == "chosen":
            return LadderOfExits(final=final)
        stops = [unit.stop for unit in plan.units[:chosen]]
        return LadderOfExits(final=final, heads=[unit.head for unit in units[:-1]], stops=stops)

    def _pass(self, ladder: LadderOfExits) -> ExitPass:
        # What every block could train with, the final model can run with.
        batch_size = min(block.batch_size for block in self._task.plan.blocks[: self._task.num_blocks])
        return ExitPass(self._store, self._ingest, ladder, batch_size=batch_size, device=self._device, stage=STAGE)

    def _files(self, ladder: LadderOfExits, made: CommittedChoice, result: dict[str, Any]) -> dict[str, bytes]:
        """Returns what the stage stores by key, the weights first."""
        weights = _saved([("", ladder.final)])
        card = self._card(made, result, checksum_of(weights))
        layout = self._layout
        files = {
            layout.model_weights: weights,
            layout.model_card: render_model_card(card, result, self._ingest.facts).encode(),
            layout.model_json: json.dumps(card.to_json(), indent=2).encode(),
        }
        if made.choice.early_exits is None:
            return files
        files[layout.early_exit_heads] = _saved([(f"{idx}.", head) for idx, head in enumerate(ladder.heads)])
        files[layout.early_exit_json] = json.dumps(asdict(self._early_card(made)), indent=2).encode()
        return files

    def _early_card(self, made: CommittedChoice) -> EarlyExitCard:
        units = zip(self._task.plan.units[: made.choice.chosen_exit], self._exits, strict=False)
        kept = (KeptExit(num_layers=u.stop, head=u.head or self._head_name, layer=one.layer) for u, one in units)
        return EarlyExitCard(exits=tuple(kept), plan=made.choice.early_exits)

    @property
    def _head_name(self) -> str:
        return self._task.config.train.head

    def _card(self, made: CommittedChoice, result: dict[str, Any], checksum: str) -> ModelCard:
        chosen, facts, plan = result["exits"][result["chosen_exit"]], self._ingest.facts, self._task.plan
        return ModelCard(
            model=plan.model,
            inputs=plan.inputs,
            target=plan.target,
            class_names=tuple(facts["class_names"]),
            head=plan.units[result["chosen_exit"]].head or self._head_name,
            num_layers=chosen["layer_idx"] + 1,
            contexts=self._ladder(made.choice.chosen_exit).final.enters_at,
            exit_layer_idx=chosen["layer_idx"],
            exit_layer=chosen["layer"],
            val_accuracy=result["val_accuracy"],
            test_accuracy=result["test_accuracy"],
            val_error=result["val_error"],
            test_error=result["test_error"],
            temperature=made.choice.calibration and made.choice.calibration.temperature,
            params=result["params_final"],
            params_full=result["params_full"],
            memory_budget_bytes=plan.budget_bytes,
            weights_checksum=checksum,
        )


def _saved(modules: list[tuple[str, nn.Module]]) -> bytes:
    """Returns weights and buffers of modules as safetensors, their names behind a prefix for each."""
    named = ((prefix, name, tensor) for prefix, module in modules for name, tensor in module.state_dict().items())
    return safetensors.torch.save({f"{prefix}{name}": tensor.cpu().contiguous() for prefix, name, tensor in named})
