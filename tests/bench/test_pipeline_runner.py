"""The pipeline in the benchmark: every second counts once, however many processes it takes."""

import dataclasses

import pytest

from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.images import ingest_images, share_images
from nf_pipeline.bench.pipeline_runner import (
    hand_plan,
    plan_ahead,
    planned_epoch_s,
    read_bytes,
    run_pipeline,
)
from nf_pipeline.bench.run_config import config_for
from nf_pipeline.bench.settings import BenchSettings

SETTINGS = BenchSettings(max_train_images=200, epochs=2)
CELL = Cell(kind="train", model="convnet", method="nf", budget_bytes=3 * 2**20)


def run_in_parts(images, folder, seconds, budget=3 * 2**20):
    config = config_for(SETTINGS, CELL, folder)
    fixed = config.train.model_copy(update={"unit_layers": 2})  # planned alike each time, without timings
    config = config.model_copy(
        update={"train": fixed, "memory": config.memory.model_copy(update={"budget_bytes": budget})}
    )
    share_images(images, folder)
    for _ in range(20):
        result = run_pipeline(config, deadline=Deadline(seconds), tell=lambda text: None)
        if result is not None:
            return result
    raise AssertionError("it never ended")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    ingest_images(config_for(SETTINGS, CELL, folder))
    return folder


def test_pipeline_cut_after_every_epoch_ends_as_one_that_was_not(images, tmp_path):
    whole = run_in_parts(images, tmp_path / "whole", None)
    parts = run_in_parts(images, tmp_path / "parts", 0.0)
    assert whole["sessions"] == 1 and parts["sessions"] > 2
    assert [accuracy for _, accuracy in parts["curve"]] == [accuracy for _, accuracy in whole["curve"]]
    assert parts["test_accuracy"] == whole["test_accuracy"]
    assert parts["measured_peak_bytes"] == whole["measured_peak_bytes"] <= 3 * 2**20
    seconds = [moment for moment, _ in parts["curve"]]
    assert seconds == sorted(seconds)


def test_pipeline_without_a_plan_says_the_smallest_budget(images, tmp_path):
    result = run_in_parts(images, tmp_path, None, budget=2**16)
    assert result["status"] == "does not fit"
    assert 2**16 < result["needs_bytes"] < 3 * 2**20


class Killed(BaseException):
    """Ends a run as a kill would: nobody catches it."""


def test_seconds_of_planning_count_although_the_process_dies_in_the_first_epoch(images, tmp_path):
    config = config_for(SETTINGS, CELL, tmp_path)
    share_images(images, tmp_path)

    def die(text):
        raise Killed

    with pytest.raises(Killed):
        run_pipeline(config, deadline=Deadline(None), tell=die)
    result = run_pipeline(config, deadline=Deadline(None), tell=lambda text: None)
    assert result["sessions"] == 2
    assert result["parts"]["profiling and planning"] > 0.0
    assert result["curve"][0][0] > result["parts"]["profiling and planning"]


def test_tries_share_one_plan_and_end_before_the_final_model(images, tmp_path):
    ahead = config_for(SETTINGS, CELL, tmp_path / "plan")
    share_images(images, tmp_path / "plan")
    planned = plan_ahead(ahead)
    assert plan_ahead(ahead) == planned
    assert planned_epoch_s(planned, SETTINGS.epochs) > 0.0
    config = config_for(SETTINGS, dataclasses.replace(CELL, lr=0.01), tmp_path / "try", epochs=1)
    share_images(images, tmp_path / "try")
    hand_plan(planned, config)
    result = run_pipeline(config, deadline=Deadline(None), tell=lambda text: None, with_model=False)
    assert result["status"] == "done" and 0.0 <= result["best_val_accuracy"] <= 1.0
    assert plan_ahead(config)["blocks"] == planned["blocks"]
    assert not (tmp_path / "try" / "bench" / "model").exists()


def test_bytes_read_are_those_of_every_pass_over_a_source():
    blocks = [
        {"block_idx": 0, "source_block": -1, "shard_bytes": 100},
        {"block_idx": 1, "source_block": 0, "shard_bytes": 0},
        {"block_idx": 2, "source_block": 0, "shard_bytes": 0},
    ]
    assert read_bytes(blocks, image_bytes=10, num_epochs=5) == 10 * 6 + 100 * 5 + 100 * 5
    # Half of what is stored is one of several views: two passes over the images wrote it.
    assert read_bytes(blocks, image_bytes=10, num_epochs=5, view_share=0.5) == 10 * 5 + 20 + 50 * 5 + 50 * 5
