"""Tables as text: what stands in which row."""

from typing import Any

from nf_pipeline.cli.tables import (
    adaptive_text,
    align,
    checks_text,
    evaluation_text,
    garbage_text,
    plan_text,
    prediction_text,
    status_text,
    summary_text,
)
from nf_pipeline.driver.doctor import Check
from nf_pipeline.driver.garbage import Garbage
from nf_pipeline.driver.status import StageStatus
from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.samples import InputSpec, TargetSpec

MIB = 2**20


def test_align_puts_numbers_right_and_words_left() -> None:
    assert align(["name", "bytes"], [["a", "7"], ["long name", ""], ["b", "1,234 B"]]).splitlines() == [
        "name         bytes",
        "---------  -------",
        "a                7",
        "long name",
        "b          1,234 B",
    ]


def test_align_without_rows_is_headers_and_rule() -> None:
    assert align(["a", "b"], []).splitlines() == ["a  b", "-  -"]


def two_block_plan() -> Plan:
    return Plan(
        model="convnet",
        target=TargetSpec(size=10),
        inputs=InputSpec(shape=(1, 8, 8)),
        budget_bytes=64 * MIB,
        layers=tuple(
            LayerSpec(layer_idx=i, name=f"features.{i}", out_shape=(32, 8, 8), params=100, flops=1000)
            for i in range(3)
        ),
        units=(
            UnitProfile(
                unit_idx=0,
                start=0,
                stop=3,
                bytes_per_sample=1,
                constant_bytes=1,
                resident_bytes=1,
                head_params=1,
                head_flops=1,
            ),
        ),
        blocks=tuple(
            BlockPlan(
                block_idx=idx,
                units=(0, 1),
                layers=layers,
                batch_size=batch,
                budget_bytes=2**26,
                predicted_peak_bytes=peak * MIB,
                shard_bytes=shard_bytes,
                reason=reason,
            )
            for idx, (layers, batch, peak, shard_bytes, reason) in enumerate(
                [
                    ((0, 2), 48, 60, 2 * MIB, "the next unit's batch differs by 50 %"),
                    ((2, 3), 128, 32, 0, "last"),
                ]
            )
        ),
        params_full=12_345,
        flops_full=1000,
        profile_s=1.25,
    )


def placement_on(**changes: Any) -> dict[str, Any]:
    document = {
        "executor": "ray",
        "address": None,
        "device": "auto",
        "mode": "sequential",
        "workers_per_block": 1,
        "block_memory_bytes": [62 * MIB, 33 * MIB],
        "host_buffer_bytes": 512 * MIB,
        "workers_that_fit": [None, None],
    }
    return {**document, **changes}


def test_plan_text_has_a_row_per_block_with_the_reason() -> None:
    text = plan_text(two_block_plan(), placement_on(address="head:6379", workers_that_fit=[1, 5]))
    first, second = (line for line in text.splitlines() if line.strip().startswith(("1/2", "2/2")))
    assert "block 1: the next unit's batch differs by 50 %" in text.splitlines()
    assert "0-1" in first and "48" in first and "60.0/64.0 MiB (94 %)" in first and "2.0 MiB" in first
    assert "2-2" in second and "128" in second and "32.0/64.0 MiB (50 %)" in second
    assert first.endswith("62.0 MiB                 1") and second.endswith("33.0 MiB                 5")
    assert "convnet: 3 layers, 1 units, 12.3 k parameters, samples 1x8x8, 10 classes, budget 64.0 MiB" in text
    assert "on the Ray at head:6379, device auto; activations 2.0 MiB in all; profiled in 1.2 s" in text
    assert "host memory of a worker: up to 512.0 MiB to read and write shards" in text


def test_plan_text_names_each_kind_of_placement() -> None:
    plan = two_block_plan()
    inline = plan_text(plan, placement_on(executor="inline"))
    assert "one block after another in this process" in inline and "workers that fit" not in inline
    assert "on a local Ray" in plan_text(plan, placement_on())
    rounds = plan_text(plan, placement_on(mode="pipelined", workers_per_block=2))
    assert "all blocks side by side, in rounds, with 2 workers each on a local Ray" in rounds


def summary_document(**changes: Any) -> dict[str, Any]:
    exits = [
        {
            "layer_idx": layer_idx,
            "layer": f"features.{layer_idx}",
            "val_accuracy": accuracy,
            "val_interval": [accuracy - 0.01, accuracy + 0.01],
            "params": params,
            "flops": 1_500_000_000,
        }
        for layer_idx, accuracy, params in [(2, 0.5, 30_000), (5, 0.613, 250_000), (8, 0.614, 1_000_000)]
    ]
    block = {
        "block_idx": 0,
        "layers": [0, 9],
        "batch_size": 32,
        "predicted_peak_bytes": 60 * MIB,
        "measured_peak_bytes": 48 * MIB,
        "train_s": 75.0,
        "shard_bytes": 0,
        "attempts": 2,
    }
    document = {
        "memory_budget_bytes": 64 * MIB,
        "blocks": [block],
        "exits": exits,
        "chosen_exit": 1,
        "chosen_reason": "0.1 points below the best, which is within the tolerance of 0.5",
        "val_accuracy": 0.613,
        "val_accuracy_corrected": 0.611,
        "val_interval_corrected": [0.59, 0.63],
        "calibration": {"temperature": 1.25, "ece_before": 0.08, "ece_after": 0.02},
        "test_accuracy": 0.605,
        "test_reads": 1,
        "params_full": 1_000_000,
        "params_final": 250_000,
        "wall_s": 80.0,
        "stopped_early": False,
    }
    return document | changes


def test_summary_text_marks_the_chosen_exit_and_says_why() -> None:
    lines = summary_text(summary_document(), "./nf-runs/run").splitlines()
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1
    assert marked[0].split() == [
        *("*", "1", "features.5", "61.3", "%", "60.3-62.3", "%", "250.0", "k", "25.0", "%", "1.500")
    ]
    assert "chosen: exit 1 (features.5), 0.1 points below the best, which is within the tolerance of 0.5" in lines
    assert "validation 61.3 %, test 60.5 %, 250.0 k of 1.00 M parameters (4.0x smaller), 1m in all" in lines


def test_summary_text_says_what_the_choice_is_worth_and_how_often_the_test_split_was_read() -> None:
    text = summary_text(summary_document(), "u")
    corrected = "corrected for the choice: validation 61.1 % (59.0-63.0 %)"
    assert f"{corrected}; calibration error 8.0 % before and 2.0 % after temperature 1.25" in text
    assert "was read" not in text
    assert "the test split was read 2 times" in summary_text(summary_document(test_reads=2), "u")


def test_prediction_text_says_where_images_left() -> None:
    written = {"rows": 1200, "num_skipped": 0, "output": "a.parquet", "rows_by_exit": {"conv1": 1000, "conv3": 200}}
    assert prediction_text(written) == "1,200 predictions in a.parquet\nleft: 1,000 at conv1, 200 at conv3"


def test_summary_text_shows_measured_peak_against_budget() -> None:
    row = next(line for line in summary_text(summary_document(), "u").splitlines() if "0-8" in line)
    assert "48.0/64.0 MiB (75 %)" in row
    assert "60.0 MiB" in row


def test_summary_text_without_a_test_split_has_a_dash() -> None:
    text = summary_text(summary_document(test_accuracy=None, stopped_early=True), "u")
    assert "test -," in text
    assert "stopped early" in text


def status_document(*stages: StageStatus, state: str) -> dict[str, Any]:
    return {"uri": "./nf-runs/run", "state": state, "stages": [vars(stage) for stage in stages]}


def test_status_text_of_a_silent_run_says_how_to_continue() -> None:
    running = StageStatus(
        stage="block-000", state="running", attempt="ab", attempts=1, epoch=3, num_epochs=8, updated_s=7200.0
    )
    text = status_text(status_document(StageStatus(stage="ingest", state="done"), running, state="running"))
    assert "block-000 has been silent for 2h 0m." in text
    assert "nf-pipeline resume ./nf-runs/run" in text
    assert "3/8" in text


def test_status_text_of_a_lively_run_gives_no_advice() -> None:
    running = StageStatus(stage="block-000", state="running", attempts=1, updated_s=5.0)
    assert "resume" not in status_text(status_document(running, state="running"))


def test_status_text_of_a_failed_run_gives_the_error() -> None:
    failed = StageStatus(stage="block-000", state="failed", error="Diverged: NaN at step 3\nFix: less", attempts=1)
    text = status_text(status_document(failed, state="failed"))
    assert "block-000 failed: Diverged: NaN at step 3\nFix: less" in text
    assert "nf-pipeline resume ./nf-runs/run" in text


def test_evaluation_text_marks_the_chosen_exit() -> None:
    rows = [
        {**row, "layer_idx": 2, "num_images": 1797}
        for row in (
            {"exit": 0, "layer": "a", "accuracy": 0.5, "interval": [0.45, 0.55], "chosen": False},
            {"exit": 1, "layer": "b", "accuracy": 0.75, "interval": [0.7, 0.8], "chosen": True},
        )
    ]
    assert evaluation_text(rows).splitlines() == [
        "   exit  layer  accuracy     interval  samples",
        "-  ----  -----  --------  -----------  -------",
        "      0  a        50.0 %  45.0-55.0 %    1,797",
        "*     1  b        75.0 %  70.0-80.0 %    1,797",
    ]


def test_evaluation_text_of_values_gives_errors_and_no_per_cents() -> None:
    row = {"exit": 0, "layer_idx": 2, "layer": "a", "error": 0.4128, "interval": [0.39, 0.4361], "num_images": 9}
    header, _, line = evaluation_text([{**row, "chosen": True}]).splitlines()
    assert header.split() == ["exit", "layer", "error", "interval", "samples"]
    assert line.split() == ["*", "0", "a", "0.413", "0.390-0.436", "9"]


def test_adaptive_text_says_what_leaving_early_gives_and_costs() -> None:
    found = {"accuracy": 0.75, "interval": [0.7, 0.8], "num_images": 1200, "flops": 6e8, "flops_final": 1_000_000_000}
    point = {"threshold": 0.875, "val_accuracy": 0.76, "val_flops": 5e8}
    exits = [{"layer": "conv1", "share": 0.8}, {"layer": "conv3", "share": 0.2}]
    assert adaptive_text(found | point | {"exits": exits}).splitlines() == [
        "accuracy 75.0 % (70.0-80.0 %) on 1,200 samples",
        "0.600 GFLOPs per sample, 60.0 % of those without early exits",
        "threshold 0.875; on validation it had 76.0 % with 0.500 GFLOPs",
        "left: 80.0 % at conv1, 20.0 % at conv3",
    ]


def values_summary() -> dict[str, Any]:
    """The same run, had it predicted values."""
    document = summary_document(metric="error", calibration=None)
    for exit in document["exits"]:
        exit |= {"val_error": 1 - exit.pop("val_accuracy"), "val_error_interval": exit.pop("val_interval")}
    corrected = {"val_error_corrected": 0.391, "val_error_interval_corrected": [0.35, 0.42]}
    return document | corrected | {"val_error": 0.387, "test_error": 0.4}


def test_summary_text_of_values_says_error_everywhere() -> None:
    lines = summary_text(values_summary(), "u").splitlines()
    assert any("val error" in line for line in lines) and not any("accuracy" in line for line in lines)
    assert any(line.startswith("*     1  features.5      0.387  0.603-0.623") for line in lines)
    assert any(line.startswith("error on validation 0.387, test 0.400, 250.0 k of") for line in lines)
    assert "corrected for the choice: error on validation 0.391 (0.350-0.420)" in lines


def test_status_text_of_values_names_the_column_after_the_error() -> None:
    stages = [StageStatus(stage="block-000", state="done", val_error=0.4128), StageStatus(stage="model")]
    header, _, line, *_ = status_text(status_document(*stages, state="done")).splitlines()[2:]
    assert "val error" in header and "0.413" in line and "%" not in line


def test_prediction_text_counts_skipped_images_if_there_are_any() -> None:
    written = {"rows": 1797, "num_skipped": 0, "output": "out.parquet", "exit_layer": "a"}
    assert prediction_text(written) == "1,797 predictions in out.parquet"
    assert prediction_text(written | {"num_skipped": 2}) == (
        "1,797 predictions in out.parquet, 2 samples skipped that cannot be read"
    )


def test_checks_text_puts_the_fix_below_its_check() -> None:
    checks = [
        Check(name="python", state="ok", detail="3.11"),
        Check(name="ray", state="warn", detail="not installed", fix="pip install ray"),
    ]
    assert checks_text(checks).splitlines() == [
        "ok    python  3.11",
        "warn  ray     not installed",
        "              Fix: pip install ray",
    ]


def test_garbage_text_counts_and_says_whether_it_happened() -> None:
    checkpoint = "run/blocks/000/attempt-ab/checkpoint-00001.safetensors"
    objects = [
        Garbage(key=checkpoint, num_bytes=2 * MIB, kind="checkpoints"),
        Garbage(key="run/x", num_bytes=512, kind="records"),
    ]
    assert garbage_text(objects, dry_run=True).splitlines() == [
        f"   2.0 MiB  {checkpoint}",
        "     512 B  run/x",
        "would delete 2 objects, 2.0 MiB: 1 checkpoints (2.0 MiB), 1 records (512 B)",
    ]
    assert garbage_text([], dry_run=False) == "deleted 0 objects, 0 B"
