"""Baselines stay within the budget they were given, and go on where another process ended."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional

from nf_pipeline.bench.baseline_state import BaselineState
from nf_pipeline.bench.baseline_step import baseline_step
from nf_pipeline.bench.baseline_trainer import Limit, measure_epoch, smaller, train_baseline
from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.fit import Fit, FitProbe, batch_sizes, fit_budgets, fit_method, largest_that_fits
from nf_pipeline.bench.images import bytes_per_pass, ingest_images, open_images, share_images
from nf_pipeline.bench.methods import METHODS, method_named
from nf_pipeline.bench.pipeline_runner import run_pipeline
from nf_pipeline.bench.run_config import config_for
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.bench.task import Task
from nf_pipeline.core.mixup import Mix
from nf_pipeline.errors import ConfigError

MIB = 2**20
SETTINGS = BenchSettings(max_train_images=300, epochs=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    ingest_images(config_for(SETTINGS, Cell(kind="facts", model="convnet"), folder))
    return folder


@pytest.fixture
def make_task(images):
    def make(method, budget, **changes):
        cell = Cell(kind="train", model="convnet", method=method, budget_bytes=budget)
        store, ingest = open_images(images)
        settings = dataclasses.replace(SETTINGS, **changes)
        return Task(config=config_for(settings, cell, images), store=store, ingest=ingest)

    return make


def train(task, name, folder, deadline=None, **options):
    method = method_named(name)
    fit = fit_method(task, method)
    return fit, train_baseline(
        task, method, fit, folder=folder, deadline=deadline or Deadline(None), tell=lambda text: None, **options
    )


REGULARISED = "+train.label_smoothing=0.1+train.mixup=0.4"


@pytest.mark.parametrize(
    "name", ["bp", "bp-ckpt", "bp-micro", "bp-both", "bp-bf16", "dgl", f"bp{REGULARISED}", f"bp-both{REGULARISED}"]
)
def test_baseline_stays_within_its_budget_and_needs_what_was_predicted(name, make_task, tmp_path):
    budget = 12 * MIB if name == "dgl" else 5 * MIB
    fit, result = train(make_task(name, budget, epochs=1), name, tmp_path)
    assert result["status"] == "done"
    assert fit.predicted_peak_bytes <= budget
    assert result["measured_peak_bytes"] <= budget
    assert result["measured_peak_bytes"] == pytest.approx(fit.predicted_peak_bytes, rel=0.1)
    assert len(result["curve"]) == 1 and 0.0 <= result["test_accuracy"] <= 1.0


def changes_of_a_step(task, name, x_NCHW, y_N, mix=None):
    """Returns the loss, and by how much each weight moves, in a step of rate 1 that is not accumulated to."""
    method = method_named(name)
    units = [unit.train() for unit in task.units(method)]
    before = [weight.detach().clone() for unit in units for weight in unit.parameters()]
    optimizers = [torch.optim.SGD(unit.parameters(), lr=1.0) for unit in units]
    parts = {"num_parts": 4 if method.micro_batch else 1, "ends_step": True}
    losses = baseline_step(units, optimizers, x_NCHW.clone, y_N, method.precision, mix=mix, **parts)
    after = [weight.detach() for unit in units for weight in unit.parameters()]
    moved = [parts["num_parts"] * (old - new) for old, new in zip(before, after, strict=True)]
    return torch.stack(losses), moved


def gradients_of(task, x_NCHW, loss_of):
    """The same by autograd alone."""
    (unit,) = [unit.train() for unit in task.units(METHODS["bp"])]
    loss = loss_of(unit(x_NCHW)[1])
    return loss.detach(), torch.autograd.grad(loss, list(unit.parameters()))


@pytest.fixture
def batch(make_task):
    generator = torch.Generator().manual_seed(0)
    inputs = make_task("bp", MIB).inputs
    return torch.randn(8, *inputs.shape, generator=generator), torch.randint(10, (8,), generator=generator)


@pytest.mark.parametrize("base", ["bp", "bp-micro"])
def test_baselines_labels_are_smoothed_as_units_labels_are(base, make_task, batch):
    task, (x_NCHW, y_N) = make_task(f"{base}+train.label_smoothing=0.3", MIB), batch
    loss, moved = changes_of_a_step(task, base, x_NCHW, y_N)
    wanted, gradients = gradients_of(
        task, x_NCHW, lambda logits_NK: functional.cross_entropy(logits_NK, y_N, label_smoothing=0.3)
    )
    torch.testing.assert_close(loss[0], wanted)
    torch.testing.assert_close(moved, list(gradients), rtol=1e-3, atol=1e-5)
    plain, _ = changes_of_a_step(make_task(base, MIB), base, x_NCHW, y_N)
    assert abs(plain[0] - wanted) > 1e-3


@pytest.mark.parametrize("base", ["bp", "bp-micro"])
def test_baselines_samples_are_mixed_in_pairs_labels_too(base, make_task, batch):
    task, (x_NCHW, y_N) = make_task(base, MIB), batch
    mix = Mix(order_N=torch.arange(8).flip(0), share=0.7)
    loss, moved = changes_of_a_step(task, base, x_NCHW, y_N, mix)
    wanted, gradients = gradients_of(
        task,
        0.7 * x_NCHW + 0.3 * x_NCHW.flip(0),
        lambda logits_NK: (
            0.7 * functional.cross_entropy(logits_NK, y_N) + 0.3 * functional.cross_entropy(logits_NK, y_N.flip(0))
        ),
    )
    torch.testing.assert_close(loss[0], wanted)
    torch.testing.assert_close(moved, list(gradients), rtol=1e-3, atol=1e-5)


def test_heads_of_dgl_smooth_labels_too(make_task, batch):
    smoothed, _ = changes_of_a_step(make_task("dgl+train.label_smoothing=0.9", MIB), "dgl", *batch)
    plain, _ = changes_of_a_step(make_task("dgl", MIB), "dgl", *batch)
    assert len(plain) > 1 and bool((smoothed != plain).all())


@pytest.mark.parametrize("name", ["bp", "bp-ckpt", "bp-micro", "dgl"])
def test_mixing_is_priced(name, make_task):
    plain, mixed = (
        FitProbe(make_task(name + suffix, MIB), METHODS[name]).peak_bytes(64) for suffix in ("", "+train.mixup=0.2")
    )
    assert plain < mixed


def test_backpropagation_and_a_pipeline_of_one_unit_regularise_alike(make_task, images, tmp_path):
    budget, name = 14 * MIB, f"nf+train.unit_layers=1000{REGULARISED}"
    fit, result = train(make_task(f"bp{REGULARISED}", budget), f"bp{REGULARISED}", tmp_path / "bp")
    cell = Cell(kind="train", model="convnet", method=name, budget_bytes=budget)
    share_images(images, tmp_path / "nf")
    config = config_for(SETTINGS, cell, tmp_path / "nf")
    own = run_pipeline(config, deadline=Deadline(None), tell=lambda text: None)
    assert own["batch_sizes"] == result["batch_sizes"] == [fit.batch_size] == [128]
    epochs = zip(own["curve"], result["curve"], strict=False)  # ours has another point where the run ends
    assert all(accuracy == other for (_, accuracy), (_, other) in epochs)
    events = (tmp_path / "nf" / "bench" / "events.jsonl").read_text().splitlines()
    losses = [event["losses"] for event in map(json.loads, events) if "losses" in event]
    assert losses[-1] == pytest.approx([BaselineState(tmp_path / "bp").load().loss], rel=1e-5)


def test_baseline_that_cannot_mix_its_samples_is_refused(make_task, monkeypatch):
    task = make_task("bp+train.mixup=0.2", MIB)
    tokens = dataclasses.replace(task.inputs, num_tokens=5)
    monkeypatch.setattr(Task, "inputs", tokens)
    monkeypatch.setattr(Task, "cut_model", lambda task: None)
    with pytest.raises(ConfigError, match="mixup"):
        task.units(METHODS["bp"])


def test_savings_allow_larger_batches(make_task):
    fits = {name: fit_method(make_task(name, 4 * MIB), METHODS[name]) for name in ("bp", "bp-ckpt", "bp-micro")}
    assert fits["bp-ckpt"].batch_size > fits["bp"].batch_size
    assert fits["bp-micro"].batch_size == 128
    assert fits["bp-micro"].micro_batch <= fits["bp"].micro_batch
    assert fits["bp"].val_batch >= fits["bp"].micro_batch


def test_baseline_that_cannot_fit_says_what_batch_2_needs(make_task):
    fit = fit_method(make_task("bp", 2 * MIB), METHODS["bp"])
    assert (fit.micro_batch, fit.batch_size) == (0, 0)
    assert fit.predicted_peak_bytes > 2 * MIB


@pytest.mark.parametrize("name", ["bp-micro", "dgl"])
def test_baseline_cut_in_two_ends_as_one_that_was_not(name, make_task, tmp_path):
    task = make_task(name, 14 * MIB)
    _, whole = train(task, name, tmp_path / "whole")
    _, first = train(task, name, tmp_path / "parts", Deadline(0.0))
    assert first is None
    _, parts = train(task, name, tmp_path / "parts")
    assert parts["sessions"] == 2
    assert [accuracy for _, accuracy in parts["curve"]] == [accuracy for _, accuracy in whole["curve"]]
    assert parts["test_accuracy"] == whole["test_accuracy"]
    assert parts["curve"][0][0] < parts["curve"][1][0] == parts["train_s"]


def test_baseline_beyond_its_limit_is_given_up_with_its_curve_and_without_a_test(make_task, tmp_path):
    _, result = train(make_task("bp", 14 * MIB), "bp", tmp_path, limit=Limit(seconds=0.0, target=1.1))
    assert (result["status"], result["epochs"], len(result["curve"])) == ("given up", 1, 1)
    assert result["test_accuracy"] is None


def test_baseline_that_has_reached_the_target_trains_to_the_end_whatever_the_limit(make_task, tmp_path):
    _, result = train(make_task("bp", 14 * MIB), "bp", tmp_path, limit=Limit(seconds=0.0, target=0.0))
    assert (result["status"], result["epochs"]) == ("done", 2)


def test_baseline_counts_every_epochs_bytes_and_looks_at_the_test_only_if_asked(make_task, tmp_path):
    task = make_task("bp", 14 * MIB)
    _, result = train(task, "bp", tmp_path, with_test=False)
    assert result["read_bytes"] == 2 * bytes_per_pass(task.ingest) > 0
    assert result["test_accuracy"] is None


def test_measuring_an_epoch_leaves_no_state(make_task, tmp_path):
    task, method = make_task("bp-micro", 14 * MIB), METHODS["bp-micro"]
    assert measure_epoch(task, method, fit_method(task, method), tmp_path) > 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bp", "bp-micro"])
def test_fits_found_together_are_those_found_one_by_one(name, make_task):
    tasks = [make_task(name, size * MIB) for size in (2, 4, 5)]
    assert fit_budgets(tasks, METHODS[name]) == [fit_method(task, METHODS[name]) for task in tasks]


@pytest.mark.parametrize(
    ("name", "before", "after", "batch"), [("bp", 100, 90, 90), ("bp", 3, 2, 2), ("bp-micro", 64, 32, 128)]
)
def test_smaller_fit_follows_an_allocator_that_refused(name, before, after, batch):
    method = METHODS[name]
    size = 128 if method.micro_batch else before
    fit = Fit(micro_batch=before, batch_size=size, val_batch=8, segment_layers=0, predicted_peak_bytes=1)
    lowered = smaller(fit, method)
    assert (lowered.micro_batch, lowered.batch_size) == (after, batch)


@pytest.mark.parametrize("budget", range(0, 60, 7))
def test_largest_that_fits_is_what_a_walk_over_all_sizes_finds(budget):
    sizes = batch_sizes(20, divide_reference=False)
    fitting = [size for size in sizes if 3 * size <= budget]
    expected = (fitting[-1], 3 * fitting[-1]) if fitting else (0, 6)
    assert largest_that_fits(sizes, budget, lambda size: 3 * size) == expected


def test_deadline_is_over_when_the_starting_process_is_gone(monkeypatch):
    deadline = Deadline(None)
    assert deadline.leaves(1e9)
    monkeypatch.setattr("os.getppid", lambda: -1)
    assert not deadline.leaves(0.0)


def test_shared_images_are_the_same_files(images, tmp_path):
    share_images(images, tmp_path)
    share_images(images, tmp_path)
    _, ingest = open_images(images)
    _, shared = open_images(tmp_path)
    assert shared == ingest
    assert all((tmp_path / info.key).stat().st_nlink > 1 for info in ingest.shards["train"])
