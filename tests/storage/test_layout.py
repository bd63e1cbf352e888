"""The keys of a run, as DESIGN lists them."""

import re

import pytest

from nf_pipeline.errors import InternalError
from nf_pipeline.storage.layout import RunLayout, new_attempt_id
from nf_pipeline.storage.store import check_key

LAYOUT = RunLayout("demo")


def test_attempt_ids_are_8_hex_digits_and_differ():
    ids = {new_attempt_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{8}", attempt) for attempt in ids)


def test_documents_of_a_run_stand_at_its_top():
    names = [LAYOUT.run_json, LAYOUT.plan_json, LAYOUT.events_jsonl, LAYOUT.summary_json]
    assert names == [f"demo/{name}" for name in ("run.json", "plan.json", "events.jsonl", "summary.json")]


def test_objects_of_a_block_attempt_live_below_its_id():
    attempt = LAYOUT.block_attempt(7, "0a1b2c3d")
    assert attempt == "demo/blocks/007/attempt-0a1b2c3d"
    assert LAYOUT.weights(7, "0a1b2c3d") == f"{attempt}/weights.safetensors"
    assert LAYOUT.checkpoint_record(attempt) == f"{attempt}/checkpoint.json"
    assert LAYOUT.checkpoint_tensors(attempt, 12) == f"{attempt}/checkpoint-00012.safetensors"
    assert LAYOUT.shard(attempt, "train", 12) == f"{attempt}/activations/train-00012.parquet"
    assert LAYOUT.block_manifest(7) == "demo/blocks/007/manifest.json"


def test_ingest_and_model_have_their_objects_and_a_manifest():
    assert LAYOUT.ingest_attempt("aa") == "demo/ingest/attempt-aa"
    assert LAYOUT.ingest_shard("demo/ingest/attempt-aa", "val", 0) == "demo/ingest/attempt-aa/val-00000.parquet"
    assert LAYOUT.ingest_manifest == "demo/ingest/manifest.json"
    assert LAYOUT.model_manifest == "demo/model/manifest.json"
    assert LAYOUT.model_weights == "demo/model/model.safetensors"
    assert LAYOUT.model_json == "demo/model/model.json"
    assert LAYOUT.model_card == "demo/model/README.md"


@pytest.mark.parametrize(
    ("stage", "prefix"),
    [
        ("ingest", "demo/ingest"),
        ("plan", "demo/plan"),
        ("model", "demo/model"),
        ("block-000", "demo/blocks/000"),
        ("block-1234", "demo/blocks/1234"),
    ],
)
def test_every_stage_has_a_prefix(stage, prefix):
    assert LAYOUT.stage_prefix(stage) == prefix
    assert check_key(LAYOUT.attempt_prefix(stage, "aa")) == f"{prefix}/attempt-aa"


@pytest.mark.parametrize("stage", ["block-1", "block-", "train", "", "block-000/x"])
def test_unknown_stage_is_an_internal_error(stage):
    with pytest.raises(InternalError, match="want ingest"):
        LAYOUT.stage_prefix(stage)
