"""The data of the recipes is what they say; each trains through the whole pipeline to better than its baseline."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # recipes are modules of the repository, started from its root

from workflows.recipes import cloning, images, series, text  # noqa: E402
from workflows.recipes.recipe import Samples, make_parser, mean_of_train, run, run_recipes, write_splits  # noqa: E402

RECIPES = {
    f"{module.__name__.rpartition('.')[2]} {task}": recipe
    for module in (text, images, series, cloning)
    for task, recipe in module.RECIPES.items()
}
# Rows, budget and epochs with which each still learns; units are fixed, so that plans do not hang on timings.
QUICK = {
    "text convolutions": (2400, "4MiB", 2),
    "images slices": (600, "2MiB", 4),
    "series forecast": (2000, "1MiB", 4),
    "series classify": (300, "1MiB", 2),
    "cloning pendulum": (3000, "256KiB", 5),
}
SLOW = {
    "text transformer": (6400, "4MiB", 8),
    "images volumes": (900, "6MiB", 8),
}


def train_small(name: str, size: tuple[int, str, int], folder: Path) -> dict:
    rows, budget, epochs = size
    options = ["--rows", str(rows), "--memory-budget", budget, "--epochs", str(epochs), "--num-threads", "1"]
    given = make_parser("", {name: RECIPES[name]}).parse_args([*options, "--set", "train.unit_layers=2"])
    return run(RECIPES[name], folder, given)


def is_better_than_baseline(summary: dict, share: float) -> bool:
    """Whether the part of the baseline's mistakes, or of its error, that is left is below a share."""
    baseline = summary["baseline"][1]
    if summary["metric"] == "error":
        return summary["test_error"] < share * baseline
    return 1 - summary["test_accuracy"] < share * (1 - baseline)


@pytest.mark.parametrize("name", QUICK)
def test_recipe_trains_in_its_budget_to_better_than_its_baseline(name: str, tmp_path: Path) -> None:
    summary = train_small(name, QUICK[name], tmp_path)
    assert is_better_than_baseline(summary, 0.9), summary["report"]
    assert all(block["measured_peak_bytes"] <= summary["memory_budget_bytes"] for block in summary["blocks"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_larger_recipe_trains_in_its_budget_to_better_than_its_baseline(name: str, tmp_path: Path) -> None:
    summary = train_small(name, SLOW[name], tmp_path)
    assert is_better_than_baseline(summary, 0.9), summary["report"]
    assert all(block["measured_peak_bytes"] <= summary["memory_budget_bytes"] for block in summary["blocks"])


def test_clone_of_discrete_actions_balances_the_pole_for_longer_than_a_random_policy(tmp_path: Path) -> None:
    summary = train_small("cloning cart-pole", (2000, "256KiB", 3), tmp_path)
    assert is_better_than_baseline(summary, 0.5), summary["report"]
    clone = cloning.clone_of(str(tmp_path / "runs" / "recipe"), "workflows.recipes.cloning:perceptron")
    assert cloning.play("cart-pole", clone, 3) > 5 * cloning.play("cart-pole", None, 3)


@pytest.mark.parametrize("task", cloning.ENVIRONMENTS)
def test_controller_earns_much_more_than_a_random_policy(task: str) -> None:
    controller, random = cloning.play(task, cloning.CONTROLLERS[task]), cloning.play(task, None)
    best = {"cart-pole": 500.0, "pendulum": 0.0}[task]
    assert best - controller < 0.2 * (best - random)


@pytest.mark.parametrize("name", RECIPES)
def test_splits_are_the_same_for_the_same_seed(name: str) -> None:
    one, other = (RECIPES[name].load(60, 3) for _ in range(2))
    for split in ("train", "val", "test"):
        assert np.array_equal(np.asarray(one[split].inputs), np.asarray(other[split].inputs))
        assert np.array_equal(one[split].labels, other[split].labels)
        assert len(one[split].labels) == len(one[split].inputs) > 0


def test_names_of_the_same_thing_are_in_one_split_and_in_one_language_each() -> None:
    names = text.read_names()
    assert ("Germany", "Alemania", "es") in names and ("Germany", "Németország", "hu") in names
    assert len({name for _, name, _ in names}) == len(names)
    assert {language for _, _, language in names} == set(text.LANGUAGES)
    splits = text.load_names(800, 0)
    counts = np.unique(splits["train"].labels, return_counts=True)[1]
    assert counts.tolist() == [100] * len(text.LANGUAGES)


def test_text_becomes_known_rare_and_padding_tokens() -> None:
    tokens = text.encode("Ba☃")
    assert tokens.dtype == np.int32 and tokens.shape == (text.LENGTH,)
    assert tokens[:3].tolist() == [3, 2, 1] and not tokens[3:].any()
    assert text.encode("x" * 99).min() > 1 and tokens.max() < text.NUM_TOKENS


def test_pieces_of_different_splits_share_no_voxel() -> None:
    (train_x, _), (val_x, val_y), (test_x, test_y) = (images.REGIONS[name] for name in ("train", "val", "test"))
    assert train_x[1] <= min(val_x[0], test_x[0]) and val_y[1] <= test_y[0]


def test_lesion_changes_tissue_in_its_direction_and_only_near_the_middle() -> None:
    piece_DHW = np.full((8, images.SIDE, images.SIDE), 10_000, np.uint16)
    for sign in (1, -1):
        change_DHW = images.add_lesion(piece_DHW, sign, np.random.default_rng(0)).astype(int) - piece_DHW
        assert (change_DHW * sign >= 0).all() and 4000 < np.abs(change_DHW).max() < 9000
        assert np.abs(change_DHW[:, 0, 0]).max() < 500


def test_slices_are_written_as_pictures_that_keep_16_bits_and_volumes_as_tensors(tmp_path: Path) -> None:
    for name in ("slices", "volumes"):
        write_splits(tmp_path / name, RECIPES[f"images {name}"].load(6, 0))
    slices = pq.read_table(tmp_path / "slices" / "train-0.parquet")["inputs"].to_pylist()
    with Image.open(io.BytesIO(slices[0]["bytes"])) as image:
        assert image.mode == "I;16" and np.asarray(image).max() > 255
    kind = pq.read_schema(tmp_path / "volumes" / "train-0.parquet").field("inputs").type
    assert list(kind.shape) == [1, 8, images.SIDE, images.SIDE] and str(kind.value_type) == "uint16"


def test_windows_of_glucose_hold_no_gap_and_end_with_the_differences_that_follow() -> None:
    levels_L = np.arange(200.0)
    times_L = series.STEP_S * levels_L
    times_L[100:] += 3600.0
    samples = series._windows(levels_L, times_L, 1000)
    assert len(samples.labels) == 2 * (100 - series.PAST - series.FUTURE + 1)
    assert np.array_equal(samples.labels[0], np.arange(1.0, series.FUTURE + 1))
    assert np.array_equal(samples.inputs[0, 0], np.arange(float(series.PAST)))
    assert (samples.inputs[:, 1, -1] == 0).all()


def test_splits_of_forecasts_follow_each_other_in_time() -> None:
    ends = [end for name in ("train", "val", "test") for end in series.SHARES[name]]
    assert ends == sorted(ends)


@pytest.mark.parametrize("kind", series.CHARTS)
def test_chart_goes_where_its_name_says(kind: str) -> None:
    rng = np.random.default_rng(0)
    change = np.mean(
        [chart[-20:].mean() - chart[:20].mean() for chart in (series.make_chart(kind, rng) for _ in range(50))]
    )
    direction = {"rising": 1, "shifted up": 1, "falling": -1, "shifted down": -1}.get(kind, 0)
    assert (change > 5) == (direction > 0) and (change < -5) == (direction < 0)


def test_mean_of_train_has_an_error_of_one_on_train_itself() -> None:
    values = Samples(inputs=np.zeros((50, 1)), labels=np.random.default_rng(0).normal(3, 9, (50, 2)))
    assert mean_of_train({"train": values, "test": values}) == ("mean of train", pytest.approx(1.0))


def test_command_prints_blocks_exits_baseline_backpropagation_and_returns(tmp_path: Path) -> None:
    quick = ["--rows", "300", "--epochs", "1", "--num-threads", "1", "--set", "train.unit_layers=1", "--compare"]
    command = [sys.executable, "-m", "workflows.recipes.cloning", "--output", str(tmp_path), *quick]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for words in ("300 train", "exit 2", "baseline (majority class)", "backpropagation", "random", "clone"):
        assert words in done.stdout


def test_command_shows_a_documented_error_and_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "classify", "--rows", "60", "--output", str(tmp_path), "--memory-budget", "1KiB"]
    monkeypatch.setattr(sys, "argv", ["series", *options])
    with pytest.raises(SystemExit) as end:
        run_recipes("", series.RECIPES)
    assert end.value.code == 3
    shown = capsys.readouterr().err
    assert shown.startswith("Error: ") and "Fix: " in shown
