import inspect
import pickle

import pytest

from nf_pipeline import errors

EXAMPLES = [
    errors.ConfigError("train.lr: got -1, want more than 0", "change train.lr"),
    errors.DataError("row 17 of a.parquet: no image", "--on-bad-image skip"),
    errors.RunConflict("run 'a' has another configuration", "another --run"),
    errors.RunLocked("run 'a' is being trained by host:7", "wait for it"),
    errors.PlanError("features.0", 4 * 2**20, 2**20, 5 * 2**20),
    errors.StorageError("disk full", "/data", "free some space"),
    errors.StoreUnreachable("503", "s3://bucket", "check the server"),
    errors.ObjectMissing("no manifest", "s3://bucket"),
    errors.ObjectCorrupt("wrong checksum", "s3://bucket", "resume"),
    errors.StageOutdated("other input", "s3://bucket", "repair", "run/blocks/001/manifest.json"),
    errors.OtherVersion("format_version: got 1, want 2", "s3://bucket", "train again"),
    errors.AlreadyExists("manifest is there", "/data"),
    errors.BlockError("block-001", "stopped", "try again"),
    errors.OutOfBudget("block-001", "peak 3 MiB, budget 2 MiB", "raise the budget"),
    errors.Diverged("block-001", "loss nan in epoch 1", "lower train.lr"),
    errors.WorkerLost("block-001", "WorkerCrashedError", ""),
    errors.InputReplaced("block-002", "attempt 1f2e gave way to attempt 3d4c", ""),
    errors.StageStopped("block-001 was stopped"),
    errors.RunInterrupted("stopped as asked"),
    errors.NFError("base"),
    errors.InternalError("a bug"),
]


def test_every_error_class_has_an_example() -> None:
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.NFError)}
    assert classes == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_pickling_with_its_fields_and_text(error: errors.NFError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


def test_plan_error_names_layer_need_budget_and_smallest_budget() -> None:
    text = str(errors.PlanError("features.0", 4 * 2**20, 2**20, 5 * 2**20))
    assert "features.0" in text
    assert "4.0 MiB" in text
    assert "1.0 MiB" in text
    assert f"--memory-budget {5 * 2**20}" in text


@pytest.mark.parametrize("error", EXAMPLES[:-3], ids=lambda error: type(error).__name__)
def test_documented_errors_have_a_documented_exit_code(error: errors.NFError) -> None:
    assert error.exit_code in (2, 3, 4, 5)
