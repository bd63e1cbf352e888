"""The list of networks that can be cut, planned and trained says what happened to each, and keeps what it had."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "workflows" / "model_coverage.py"


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import model_coverage

    return model_coverage


def arguments(**changes: object) -> argparse.Namespace:
    settings = {"image_size": None, "plan": True, "train": True, "max_params": 1e7, "time_limit": 60.0}
    return argparse.Namespace(**{**settings, **changes})


def test_networks_are_cut_or_refused_with_the_reason_and_earlier_results_stay(
    tmp_path: Path, coverage: ModuleType
) -> None:
    output = tmp_path / "coverage.json"
    earlier = coverage.Coverage(model="timm:some_net", family="some", reason="it was tried before")
    coverage.write(output, [earlier])
    names = ("torchvision:swin_t", "torchvision:alexnet")
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--models", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| torchvision | 2 | 1 | 0 | 0 | 1 |" in done.stdout
    assert done.stdout.strip() in output.with_suffix(".md").read_text(encoding="utf8")
    models = coverage.read(output)
    assert models["timm:some_net"] == earlier
    swin, alexnet = models["torchvision:swin_t"], models["torchvision:alexnet"]
    assert swin.status == "refused" and "blocks" in swin.reason and "/" not in swin.reason
    assert (alexnet.status, alexnet.image_size, alexnet.num_layers) == ("cut", 64, 5)
    assert alexnet.largest_difference == 0.0 and alexnet.smallest_budget_bytes is None


def test_network_is_planned_for_its_smallest_budget_and_trains_within_it(
    coverage: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "SPLIT_ROWS", {"train": 8, "val": 8})  # small batches are measured sooner
    start = coverage.Coverage(model="torchvision:squeezenet1_1", family="squeezenet")
    *_, result = coverage.stages(start, arguments())
    assert (result.status, result.reason, result.image_size) == ("trained", "", 32)
    assert result.blocks[-1].layers[1] == result.num_layers
    for block in result.blocks:
        assert block.measured_peak_bytes <= block.predicted_peak_bytes <= result.smallest_budget_bytes
    assert json.dumps(coverage.asdict(result))


def test_network_that_takes_too_long_is_refused_with_that_reason(coverage: ModuleType) -> None:
    start = coverage.Coverage(model="torchvision:vgg11", family="vgg")
    result = coverage.run_apart(start, arguments(time_limit=0.01))
    assert (result.status, result.reason) == ("refused", "took more than 0.01 s")
