"""Runs of another version of this program: one error says so, wherever they are opened."""

from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_runs import Run, config_of, edit

from nf_pipeline import load_model
from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.data.activation_shards import ActivationShards
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_plan, read_status
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import EXIT_STORAGE, OtherVersion
from nf_pipeline.model_files import ModelCard

USES: dict[str, Callable[[Run], object]] = {
    "train": lambda run: train(config_of(run.store)),
    "resume": lambda run: resume(run.uri),
    "repair": lambda run: resume(run.uri, repair=True),
    "status": lambda run: read_status(run.uri),
    "plan": lambda run: read_plan(run.uri),
    "verify": lambda run: verify_run(run.uri),
    "gc": lambda run: collect_garbage(run.uri, dry_run=False, keep="none"),
    "load": lambda run: load_model(run.uri),
    "activations": lambda run: ActivationShards(run.uri, 0),
}


@pytest.fixture(scope="module")
def old_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run all of whose documents are of the version before."""
    run = finished_run.copy(tmp_path_factory.mktemp("old") / "runs")
    for pattern in ("run.json", "plan.json", "summary.json", "*/manifest.json", "blocks/*/manifest.json"):
        for path in run.folder.glob(pattern):
            edit(path, lambda document: document.update(format_version=FORMAT_VERSION - 1))
    return run


def documents(run: Run) -> dict[str, bytes]:
    return {key: data for key, data in run.files().items() if "/lock/" not in key}


@pytest.mark.parametrize("use", USES)
def test_run_of_another_version_is_refused_with_both_versions_and_stays_as_it_is(old_run: Run, use: str) -> None:
    before = documents(old_run)
    with pytest.raises(
        OtherVersion, match=f"format_version: got {FORMAT_VERSION - 1}, want {FORMAT_VERSION}"
    ) as caught:
        USES[use](old_run)
    assert "another --run name" in str(caught.value)
    assert caught.value.exit_code == EXIT_STORAGE
    assert documents(old_run) == before


def test_model_card_of_another_version_is_refused_for_that_before_any_field_is_missed(tmp_path: Path) -> None:
    with pytest.raises(OtherVersion, match=f"got 1, want {FORMAT_VERSION}"):
        ModelCard.from_json({"format_version": 1, "model": "convnet"}, str(tmp_path))
