"""The texts of a run's progress, from events with given times."""

from dataclasses import replace

import pytest

from nf_pipeline.cli.run_view import RunView, format_duration, format_peak
from nf_pipeline.events import EpochDone, Note, Progress, StageDone, StageFailed, StageSkipped, StageStarted
from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.samples import InputSpec, TargetSpec

GIB = 2**30


def plan_of(block_flops: list[int], budget_bytes: int = 6 * GIB) -> Plan:
    """One layer, one unit per block; a tenth of a block's FLOPs are its head's."""
    layers = [
        LayerSpec(layer_idx=i, name=f"features.{i}", out_shape=(8, 4, 4), params=10, flops=flops * 9 // 10)
        for i, flops in enumerate(block_flops)
    ]
    units = [
        UnitProfile(
            unit_idx=i,
            start=i,
            stop=i + 1,
            bytes_per_sample=1,
            constant_bytes=1,
            resident_bytes=1,
            head_params=1,
            head_flops=flops // 10,
        )
        for i, flops in enumerate(block_flops)
    ]
    blocks = [
        BlockPlan(
            block_idx=i,
            units=(i, i + 1),
            layers=(i, i + 1),
            batch_size=32,
            budget_bytes=budget_bytes,
            predicted_peak_bytes=5 * GIB,
            shard_bytes=0,
            reason="the last layer",
        )
        for i in range(len(block_flops))
    ]
    return Plan(
        model="convnet",
        target=TargetSpec(size=10),
        inputs=InputSpec(shape=(1, 8, 8)),
        budget_bytes=budget_bytes,
        layers=tuple(layers),
        units=tuple(units),
        blocks=tuple(blocks),
        params_full=100,
        flops_full=1000,
        profile_s=0.5,
    )


def started(stage: str, time_s: float, resumed_epochs: int = 0) -> StageStarted:
    return StageStarted(stage=stage, time_s=time_s, attempt="ab", worker="host:1", resumed_epochs=resumed_epochs)


def epoch_done(stage: str, time_s: float, epoch: int, num_epochs: int = 10) -> EpochDone:
    return EpochDone(
        stage=stage,
        time_s=time_s,
        epoch=epoch,
        num_epochs=num_epochs,
        losses=[1.5, 0.412],
        val_accuracies=[0.4, 0.613],
        images_per_s=5120.4,
        loader_wait_s=0.1,
        peak_bytes=int(5.1 * GIB),
    )


def follow(*events, plan: Plan | None = None) -> RunView:
    view = RunView(plan)
    for event in events:
        view.update(event)
    return view


def test_line_of_an_epoch_has_the_documented_fields_in_order() -> None:
    # 2 of 10 epochs took 24 s: 96 s remain here, and each of four later blocks takes a third of 120 s.
    plan = plan_of([300, 300, 300, 100, 100, 100, 100])
    view = follow(started("block-002", 0.0), epoch_done("block-002", 24.0, 2), plan=plan)
    assert view.line("block-002") == (
        "block 3/7 | epoch 2/10 | loss 0.412 | val 61.3 % | img/s 5,120 | peak 5.1/6.0 GiB (85 %) | ETA 4m"
    )
    assert view.eta_s("block-002") == pytest.approx(96 + 4 * 40)


def test_line_before_anything_is_measured_has_dashes_in_place() -> None:
    progress = Progress(stage="block-000", time_s=1.0, phase="train", done=0, total=100, epoch=1, num_epochs=3)
    view = follow(started("block-000", 1.0), progress)
    assert view.line("block-000") == "block 1 | epoch 1/3 | loss - | val - | img/s - | peak - | ETA -"


def test_validation_shows_its_phase_and_keeps_the_speed_of_training() -> None:
    common = {"stage": "block-000", "epoch": 1, "num_epochs": 2}
    trained = Progress(**common, time_s=5.0, phase="train", done=100, total=100, images_per_s=50.0, loss=1.5)
    validated = Progress(**common, time_s=6.0, phase="validate", done=1200, total=5000, images_per_s=400.0)
    view = follow(started("block-000", 0.0), trained, validated)
    assert view.line("block-000").startswith(
        "block 1 | epoch 1/2 validate 1,200/5,000 | loss 1.500 | val - | img/s 50 |"
    )
    assert view.fraction("block-000") == pytest.approx(0.5)
    view.update(epoch_done("block-000", 7.0, 1, 2))
    assert view.line("block-000").startswith("block 1 | epoch 1/2 | loss 0.412 | val 61.3 % | img/s 5,120 |")


def test_profile_of_a_plan_shows_how_many_units_are_done() -> None:
    progress = Progress(stage="plan", time_s=2.0, phase="profile", done=3, total=12)
    view = follow(started("plan", 1.0), progress)
    assert view.line("plan") == "plan | profile 3/12"
    assert view.fraction("plan") == pytest.approx(0.25)


def test_eta_after_resume_counts_only_what_this_attempt_did() -> None:
    events = (started("block-000", 0.0, resumed_epochs=6), epoch_done("block-000", 10.0, 7))
    view = follow(*events, plan=plan_of([100]))
    assert view.eta_s("block-000") == pytest.approx(30.0)


def test_eta_within_an_epoch_uses_the_part_that_is_done() -> None:
    progress = Progress(stage="block-000", time_s=5.0, phase="train", done=50, total=100, epoch=1, num_epochs=2)
    view = follow(started("block-000", 0.0), progress, plan=plan_of([100, 100]))
    assert view.eta_s("block-000") == pytest.approx(15 + 20)
    assert view.fraction("block-000") == pytest.approx(0.25)


def test_eta_starts_anew_with_a_new_attempt() -> None:
    events = [started("block-000", 0.0), epoch_done("block-000", 500.0, 1), started("block-000", 600.0)]
    view = follow(*events, epoch_done("block-000", 610.0, 1), plan=plan_of([100]))
    assert view.eta_s("block-000") == pytest.approx(90.0)


def test_plan_is_taken_from_the_event_that_ends_its_stage() -> None:
    plan = plan_of([100, 100])
    event = StageDone(stage="plan", time_s=1.0, result=plan.to_json(), seconds=0.5)
    view = follow(event)
    assert view.label("block-001") == "block 2/2"
    lines = view.messages(event)
    assert lines[0] == "plan | done in 0s"
    assert lines[2] == (
        "plan | block 2/2 | layers 1-1 | batch 32 | predicted peak 5.0/6.0 GiB (83 %) | the last layer"
    )


def test_phases_other_than_training_show_counts() -> None:
    progress = Progress(stage="ingest", time_s=1.0, phase="read", done=12000, total=50000, images_per_s=900.0)
    view = follow(progress)
    assert view.line("ingest") == "ingest | read 12,000/50,000 | img/s 900"
    assert view.fraction("ingest") == pytest.approx(0.24)


def test_writing_after_training_shows_its_own_progress() -> None:
    events = [started("block-000", 0.0), epoch_done("block-000", 1.0, 2, num_epochs=2)]
    view = follow(*events, Progress(stage="block-000", time_s=2.0, phase="write", done=10, total=40))
    assert view.line("block-000").startswith("block 1 | write 10/40")
    assert view.fraction("block-000") == pytest.approx(0.25)


def test_finished_block_shows_its_training_and_the_time_it_took() -> None:
    write = Progress(stage="block-000", time_s=2.0, phase="write", done=10, total=40)
    done = StageDone(stage="block-000", time_s=3.0, result={}, seconds=70.0)
    view = follow(started("block-000", 0.0), epoch_done("block-000", 1.0, 2, num_epochs=2), write, done)
    assert view.line("block-000").startswith("block 1 | epoch 2/2 | loss 0.412 | val 61.3 %")
    assert view.line("block-000").endswith("| took 1m")
    assert view.fraction("block-000") == 1.0


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (started("block-000", 0.0, 3), "block 1 | started on host:1, 3 epochs taken over from a checkpoint"),
        (StageSkipped(stage="ingest", note="verified"), "ingest | skipped: verified"),
        (
            StageFailed(stage="block-000", attempt="ab", error="Diverged", text="NaN\nFix: less"),
            "block 1 | failed: Diverged: NaN",
        ),
        (Note(stage="plan", text="batch 32 -> 30", level="warning"), "plan | warning: batch 32 -> 30"),
        (Note(stage="plan", text="hello"), "plan | hello"),
        (StageDone(stage="model", result={}, seconds=75.0), "model | done in 1m"),
    ],
)
def test_messages_are_one_line_each(event, line: str) -> None:
    assert follow(event).messages(event) == [line]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.4, "59s"), (59.6, "1m"), (240, "4m"), (3599, "1h 0m"), (4800, "1h 20m")],
)
def test_format_duration_uses_at_most_two_units(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("peak", "budget", "text"),
    [
        (None, GIB, "-"),
        (3 * 2**20, None, "3.0 MiB"),
        (48 * 2**20, 64 * 2**20, "48.0/64.0 MiB (75 %)"),
        (2**30, 2**29, "1024.0/512.0 MiB (200 %)"),
    ],
)
def test_format_peak_uses_the_unit_of_the_budget(peak: int | None, budget: int | None, text: str) -> None:
    assert format_peak(peak, budget) == text


def test_line_of_a_block_that_predicts_values_shows_the_error_of_its_last_unit():
    done = replace(epoch_done("block-000", 10.0, 1), val_accuracies=[], val_errors=[0.9, 0.4128])
    view = follow(started("block-000", 0.0), done)
    assert "| val error 0.413 |" in view.line("block-000")
