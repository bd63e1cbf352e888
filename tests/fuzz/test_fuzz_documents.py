"""Whatever our own JSON documents hold, they are read or refused as damaged: never half-understood, never a crash."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from cases import documented, fuzz
from documents import RUN, SmallRun, make_run, sample_manifest, small_plan
from hypothesis import strategies as st
from junk import as_json, damaged, odd_json, spoiled

from nf_pipeline.cli import main
from nf_pipeline.core.calibration import Calibration
from nf_pipeline.core.early_exit_model import EarlyExitPlan
from nf_pipeline.core.early_exits import OperatingPoint
from nf_pipeline.data.held_out import HeldOutLabels, decode_labels
from nf_pipeline.documents import parse_json
from nf_pipeline.driver.run_record import load_plan, load_run, plan_of
from nf_pipeline.driver.status import read_plan, read_status
from nf_pipeline.errors import ConfigError, NFError, ObjectCorrupt, StorageError
from nf_pipeline.model_files import EarlyExitCard, KeptExit, ModelCard, read_early_exits
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.layout import RunLayout, choice_key
from nf_pipeline.storage.manifest import StageManifest, read_manifest, store_object, verify_manifest
from nf_pipeline.storage.published import Announcements, Source
from nf_pipeline.storage.sealed import seal, unseal
from nf_pipeline.storage.store import check_key, open_store
from nf_pipeline.worker.checkpoint_record import CheckpointRecord, read_record
from nf_pipeline.worker.choice import Choice, CommittedChoice, find_choice

PLAN = json.loads(json.dumps(small_plan().to_json()))
MANIFEST = sample_manifest()
SHARD = MANIFEST["shards"]["train"][0]
PUBLICATION = {"attempt": "b", "shards": {"0": SHARD, "1": {**SHARD, "num_rows": 1}}}
CHECKPOINT = asdict(
    CheckpointRecord(
        fingerprint="f", batch_size=4, epoch=1, key="small/blocks/000/attempt-b/c", checksum="s", val_results=["AQ=="]
    )
)
POINT = OperatingPoint(exits=(0,), threshold=0.5, val_accuracy=0.75, val_flops=12.5)
EXIT_PLAN = EarlyExitPlan(temperatures=(2.0, 1.25), points=(POINT,), val_accuracy=0.75)
CHOICE = asdict(
    Choice(
        fingerprint="f",
        ingest_checksum="c",
        chosen_exit=1,
        reason="the best",
        calibration=Calibration(
            temperature=1.25,
            ece_before=0.1,
            ece_after=0.05,
            cross_entropy_before=0.5,
            cross_entropy_after=0.25,
            num_samples=8,
        ),
        early_exits=EXIT_PLAN,
    )
)
KEPT = KeptExit(num_layers=1, layer="conv0", head="adaptive")
EARLY_EXITS = asdict(EarlyExitCard(exits=(KEPT,), plan=EXIT_PLAN))
MODEL_CARD = ModelCard(
    model="convnet",
    inputs=InputSpec(shape=(1, 8, 8), mean=(127.5,), std=(63.75,)),
    target=TargetSpec(size=2),
    class_names=("a", "b"),
    head="adaptive",
    num_layers=2,
    exit_layer_idx=1,
    exit_layer="conv1",
    val_accuracy=0.5,
    test_accuracy=None,
    temperature=1.25,
    params=10,
    params_full=20,
    memory_budget_bytes=1000,
    weights_checksum="sha256:0",
)
HELD_OUT = HeldOutLabels()
HELD_OUT.hold_back(np.arange(5), np.arange(5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """One run for all cases: each writes the document anew that it spoils."""
    return make_run(tmp_path_factory.mktemp("documents"))


def sealed(document: Any) -> bytes:
    """Seals what an editor who knows how would: the checksum is right."""
    try:
        return seal(document) if isinstance(document, dict) and document else as_json(document)
    except (ValueError, UnicodeEncodeError):
        return as_json(document)


@fuzz(
    "documents: any bytes",
    quick=200,
    thorough=20_000,
    data=st.one_of(st.binary(max_size=80), odd_json.map(as_json), damaged(seal(PLAN))),
)
def test_fuzz_json_of_any_bytes_is_read_or_a_value_error(data: bytes) -> None:
    for read in (parse_json, unseal):
        try:
            read(data)
        except ValueError as error:
            assert str(error)


@fuzz("documents: plan.json", quick=300, thorough=10_000, document=st.one_of(spoiled(PLAN), odd_json))
def test_fuzz_plan_with_a_wrong_field_is_read_whole_or_refused(document: Any) -> None:
    if not isinstance(document, dict):
        document = {"layers": document}
    outcome = documented(lambda: plan_of(document, "store"))
    assert isinstance(outcome, Plan | ObjectCorrupt)
    if isinstance(outcome, Plan):
        for block in outcome.blocks:
            assert outcome.units_of(block) and outcome.layers[block.layers[0] : block.layers[1]]
            assert block.batch_size >= 1


@fuzz("documents: manifests", quick=300, thorough=10_000, document=st.one_of(spoiled(MANIFEST), odd_json))
def test_fuzz_manifest_with_a_wrong_field_is_read_or_refused(document: Any, run: SmallRun) -> None:
    outcome = documented(lambda: StageManifest.from_json(document))
    assert isinstance(outcome, StageManifest | ObjectCorrupt)
    store, layout = open_store(str(run.folder)), RunLayout(RUN)
    run.folder.joinpath(layout.block_manifest(0)).parent.mkdir(parents=True, exist_ok=True)
    run.folder.joinpath(layout.block_manifest(0)).write_bytes(sealed(document))
    outcome = documented(lambda: read_manifest(store, layout.block_manifest(0)))
    if isinstance(outcome, StageManifest):
        assert outcome.num_rows("train") >= 0 and outcome.content_checksum
        for entry in outcome.named_objects:
            assert entry.key.startswith(layout.block(0)) and 0 <= entry.num_bytes < 2**63
        documented(lambda: verify_manifest(store, outcome))
    run.folder.joinpath(layout.block_manifest(0)).unlink()


@fuzz(
    "documents: keys",
    quick=200,
    thorough=10_000,
    key=st.one_of(
        st.text(max_size=20), st.sampled_from(["/etc/x", "a/../../b", "a//b", "", "a\0b", "./a", "a/.", "\ud800"])
    ),
)
def test_fuzz_key_that_leaves_the_store_is_refused(key: str, run: SmallRun) -> None:
    outcome = documented(lambda: check_key(key))
    if isinstance(outcome, str):
        assert (run.folder / outcome).resolve().is_relative_to(run.folder.resolve())
    documented(lambda: open_store(str(run.folder)).get(key))


@fuzz(
    "documents: checkpoint.json",
    quick=200,
    thorough=6_000,
    document=st.one_of(spoiled({"record": CHECKPOINT}), odd_json),
)
def test_fuzz_checkpoint_record_with_a_wrong_field_is_read_or_refused(document: Any, run: SmallRun) -> None:
    store, layout = open_store(str(run.folder)), RunLayout(RUN)
    key = layout.checkpoint_record(layout.block_attempt(0, "b"))
    run.folder.joinpath(key).parent.mkdir(parents=True, exist_ok=True)
    run.folder.joinpath(key).write_bytes(sealed(document))
    outcome = documented(lambda: read_record(store, key))
    assert isinstance(outcome, CheckpointRecord | ObjectCorrupt)
    if isinstance(outcome, CheckpointRecord):
        assert outcome.epoch >= 0 and outcome.batch_size >= 1
        documented(lambda: store.size(outcome.key))
    run.folder.joinpath(key).unlink()


@fuzz("documents: publications", quick=200, thorough=6_000, document=st.one_of(spoiled(PUBLICATION), odd_json))
def test_fuzz_publication_with_a_wrong_field_is_read_or_refused(document: Any, run: SmallRun) -> None:
    store, layout = open_store(str(run.folder)), RunLayout(RUN)
    key = layout.publication(0, 0, 0)
    run.folder.joinpath(key).parent.mkdir(parents=True, exist_ok=True)
    run.folder.joinpath(key).write_bytes(as_json(document))
    announced = Announcements(store, Source(manifest_key=layout.block_manifest(0), publication_keys=(key,)))
    outcome = documented(announced.poll)
    assert outcome is None or isinstance(outcome, ObjectCorrupt)
    if outcome is None and (shard := announced.shard("train", 0, 0, 0)) is not None:
        assert isinstance(shard.key, str) and shard.num_rows >= 1
    run.folder.joinpath(key).unlink()


@fuzz("documents: run.json", quick=100, thorough=4_000, data=st.data())
def test_fuzz_run_record_with_a_wrong_field_is_read_or_refused(data: st.DataObject, run: SmallRun) -> None:
    document = data.draw(st.one_of(spoiled(run.record), odd_json))
    run.write("run.json", sealed(document))
    outcome = documented(lambda: load_run(run.uri))
    assert not isinstance(outcome, Exception) or isinstance(outcome, ConfigError | StorageError)
    documented(lambda: load_run(run.uri, repair=True))
    documented(lambda: read_status(run.uri))
    run.write("run.json", sealed(run.record))


@fuzz("documents: events.jsonl", quick=120, thorough=6_000, data=st.data())
def test_fuzz_event_log_with_a_wrong_line_is_shown_or_refused(data: st.DataObject, run: SmallRun) -> None:
    lines = [
        as_json(data.draw(st.one_of(spoiled(event), odd_json)))
        for event in data.draw(st.permutations(run.events))[:3]
    ]
    whole = b"\n".join(lines)
    run.write("events.jsonl", data.draw(damaged(whole)) if data.draw(st.integers(0, 3)) == 0 else whole)
    assert main(["status", run.uri]) in (0, 4)
    assert main(["status", run.uri, "--json"]) in (0, 4)


@fuzz("documents: status of plan.json", quick=80, thorough=2_000, data=st.data())
def test_fuzz_status_of_a_run_with_a_wrong_plan_is_shown_or_refused(data: st.DataObject, run: SmallRun) -> None:
    run.write("plan.json", sealed(data.draw(spoiled(run.plan))))
    outcome = documented(lambda: read_plan(run.uri))
    assert isinstance(outcome, Plan | ObjectCorrupt)
    assert main(["status", run.uri]) in (0, 4)
    assert main(["gc", run.uri, "--dry-run"]) in (0, 2, 4)
    run.write("plan.json", sealed(run.plan))
    assert isinstance(documented(lambda: load_plan(open_store(str(run.folder)), RunLayout(RUN))), Plan | NFError)


@fuzz("documents: choice.json", quick=200, thorough=6_000, document=st.one_of(spoiled(CHOICE), odd_json))
def test_fuzz_choice_with_a_wrong_field_is_read_or_refused(document: Any, run: SmallRun) -> None:
    store, layout = open_store(str(run.folder)), RunLayout(RUN)
    key = choice_key(layout.model, 0)
    run.folder.joinpath(key).parent.mkdir(parents=True, exist_ok=True)
    run.folder.joinpath(key).write_bytes(sealed(document))
    outcome = documented(lambda: find_choice(store, layout.model, "f"))
    assert outcome is None or isinstance(outcome, CommittedChoice | ObjectCorrupt)
    if isinstance(outcome, CommittedChoice):
        assert outcome.choice.chosen_exit >= 0 and outcome.num_test_reads >= 1
    run.folder.joinpath(key).unlink()


@fuzz("documents: early_exits.json", quick=200, thorough=6_000, document=st.one_of(spoiled(EARLY_EXITS), odd_json))
def test_fuzz_early_exits_with_a_wrong_field_are_read_or_refused(document: Any, run: SmallRun) -> None:
    store, layout = open_store(str(run.folder)), RunLayout(RUN)
    stored = store_object(store, layout.early_exit_json, as_json(document))
    manifest = StageManifest(stage="model", fingerprint="f", attempt="a", objects=(stored,))
    outcome = documented(lambda: read_early_exits(store, layout, manifest, MODEL_CARD))
    assert isinstance(outcome, EarlyExitCard | ObjectCorrupt)
    if isinstance(outcome, EarlyExitCard):
        assert len(outcome.plan.temperatures) == len(outcome.exits) + 1
        assert outcome.plan.default in outcome.plan.points


@fuzz(
    "data: held-out labels",
    quick=200,
    thorough=10_000,
    data=st.one_of(damaged(HELD_OUT.encode()), st.binary(max_size=80)),
)
def test_fuzz_held_out_labels_with_damage_are_read_or_a_value_error(data: bytes) -> None:
    try:
        assert isinstance(decode_labels(data), HeldOutLabels)
    except ValueError as error:
        assert str(error)
