"""What is sent to a cluster, and which job belongs to which run; on a real one: tests/executors/test_ray_jobs.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.submit import (
    CONFIG_FILE,
    RunRequest,
    exit_code_of,
    jobs_address,
    next_submission_id,
    prepare,
    running_job,
    submit,
)
from nf_pipeline.errors import ConfigError
from nf_pipeline.executors.ray_jobs import Job, SubmissionIdTaken


def config(**changes: Any) -> RunConfig:
    flags = {"memory.budget_bytes": "4MiB", "run": "first", **changes}
    return resolve_config(flags=flags)


def job_of(request: RunRequest, submission_id: str = "nf-first-1", status: str = "RUNNING") -> Job:
    return Job(submission_id=submission_id, status=status, metadata=request.metadata)


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("http://head:8265/", {"RAY_ADDRESS": "head:6379"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "https://a"}, "https://a"),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": ""}, "http://b:1"),
    ],
)
def test_address_is_the_given_one_or_that_of_the_environment(
    given: str | None, environment: Mapping[str, str], address: str
) -> None:
    assert jobs_address(given, environment) == address


@pytest.mark.parametrize(
    "address", ["head:6379", "ray://head:10001", "auto", "http://", "http://head:port", "ftp://head"]
)
def test_address_of_another_kind_is_an_error_that_shows_the_right_kind(address: str) -> None:
    for given, environment, where in ((address, {}, "--address"), (None, {"RAY_ADDRESS": address}, "RAY_ADDRESS")):
        with pytest.raises(ConfigError, match=where) as caught:
            jobs_address(given, environment)
        assert "http://HEAD:8265" in caught.value.fix


def test_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_address("http://me:secret@head:8265", {})
    assert "secret" not in str(caught.value)


def test_prepared_configuration_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    there = {"cluster.address": "head:6379", "cluster.num_threads": 3}
    request = prepare(config(**{"data.source": "images", "storage.uri": "./runs", **there}))
    assert request.config.data.source == str(tmp_path / "images")
    assert request.run_uri == str(tmp_path / "runs" / "first")
    cluster = request.config.cluster
    assert (cluster.executor, cluster.address, cluster.num_threads) == ("ray", "auto", 3)
    assert [str(tmp_path / name) in note for name, note in zip(("runs", "images"), request.notes, strict=True)]
    assert not (tmp_path / "runs").exists()


def test_what_every_machine_reaches_needs_no_note() -> None:
    request = prepare(config(**{"storage.uri": "s3://bucket/runs", "data.source": "s3://bucket/images"}))
    assert request.notes == ()
    assert request.metadata["nf_run"] == "s3://bucket/runs/first"


def test_same_store_written_otherwise_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = ("./runs", str(tmp_path / "runs"), f"file://{tmp_path}/runs/")
    assert len({json.dumps(prepare(config(**{"storage.uri": uri})).metadata) for uri in uris}) == 1


def test_factory_without_its_code_gets_a_note() -> None:
    assert any("--working-dir" in note for note in prepare(config(**{"model.name": "mine:make"})).notes)


def test_inline_executor_is_refused() -> None:
    with pytest.raises(ConfigError, match="inline") as caught:
        prepare(config(**{"cluster.executor": "inline"}))
    assert caught.value.fix == "--executor ray"


def test_variables_are_handed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NF_TEST_VALUE", "kept")
    assert prepare(config(), ["NF_TEST_VALUE"]).environment == {"NF_TEST_VALUE": "kept"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hush"),
        ("RAY_AUTH_TOKEN", "hush"),
        ("https_proxy", "http://me:hush@proxy:3128"),
        ("NF_TEST_DATA", "https://host/images?X-Amz-Signature=hush"),
    ],
)
def test_credential_is_not_handed_on_where_every_user_of_the_cluster_sees_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"--env {name}") as caught:
        prepare(config(), [name])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["NF_TEST_ABSENT", "NF_TEST=hush", "", "1A", "A B"])
def test_variable_that_is_not_set_or_comes_with_its_value_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="--env") as caught:
        prepare(config(), [name])
    assert "hush" not in str(caught.value)


def test_working_dir_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--working-dir"):
        prepare(config(), working_dir=tmp_path / "absent")


def test_running_job_of_the_run_is_found_and_ended_ones_are_not() -> None:
    request, other = prepare(config()), prepare(config(run="second"))
    pending = job_of(request, "nf-first-3", "PENDING")
    ended = [
        job_of(request, f"nf-first-{idx}", status) for idx, status in enumerate(("FAILED", "STOPPED", "SUCCEEDED"))
    ]
    assert running_job([*ended, job_of(other), pending], request) == pending
    assert running_job([*ended, job_of(other), Job(submission_id="raysubmit_1", status="RUNNING")], request) is None


def test_running_job_with_other_settings_is_an_error_with_both_fingerprints() -> None:
    request, other = prepare(config()), prepare(config(**{"train.epochs": 3}))
    with pytest.raises(ConfigError, match="nf-first-1") as caught:
        running_job([job_of(other)], request)
    assert request.config.fingerprint in str(caught.value) and other.config.fingerprint in str(caught.value)


@pytest.mark.parametrize(
    ("run", "known", "wanted"),
    [
        ("first", [], "nf-first-1"),
        ("first", ["nf-first-1", "nf-first-9", "nf-first-10", "nf-first-old", "raysubmit_3"], "nf-first-11"),
        ("first", ["nf-first-2-7"], "nf-first-1"),
        ("v1.2", [], "nf-v1-2-1"),
    ],
)
def test_submission_ids_count_up(run: str, known: list[str], wanted: str) -> None:
    assert next_submission_id(run, [Job(submission_id=name, status="FAILED") for name in known]) == wanted


@pytest.mark.parametrize(
    ("status", "exit_code", "wanted"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 5),
        ("STOPPED", None, 130),
        ("SUCCEEDED", None, 0),
    ],
)
def test_end_of_a_job_has_an_exit_code(status: str, exit_code: int | None, wanted: int) -> None:
    assert exit_code_of(Job(submission_id="x", status=status, exit_code=exit_code)) == wanted


class Jobs:
    """A cluster on which somebody else is quicker."""

    def __init__(self, request: RunRequest, taken: int) -> None:
        self.request = request
        self.taken = taken
        self.known: list[Job] = []
        self.shipped: dict[str, str] = {}

    def list(self) -> list[Job]:
        return list(self.known)

    def get(self, submission_id: str) -> Job:
        return next(job for job in self.known if job.submission_id == submission_id)

    def submit(self, submission_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Any) -> None:
        folder = Path(runtime_env["working_dir"])
        self.shipped = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        if self.taken:
            self.taken -= 1
            self.known.append(job_of(self.request, submission_id))
            raise SubmissionIdTaken(submission_id)
        self.known.append(Job(submission_id=submission_id, status="PENDING", metadata=metadata))


def test_two_submissions_at_the_same_moment_give_one_job() -> None:
    request = prepare(config())
    jobs = Jobs(request, taken=1)
    job, was_there = submit(jobs, request)
    assert (job.submission_id, was_there, len(jobs.known)) == ("nf-first-1", True, 1)


def test_id_that_another_run_took_is_left_to_it() -> None:
    jobs = Jobs(prepare(config(**{"storage.uri": "s3://bucket/elsewhere"})), taken=1)
    job, was_there = submit(jobs, prepare(config()))
    assert (job.submission_id, was_there) == ("nf-first-2", False)


def test_shipped_configuration_is_read_as_it_was(tmp_path: Path) -> None:
    request = prepare(config())
    jobs = Jobs(request, taken=0)
    submit(jobs, request)
    assert list(jobs.shipped) == [CONFIG_FILE]
    (tmp_path / CONFIG_FILE).write_text(jobs.shipped[CONFIG_FILE])
    assert resolve_config(file=tmp_path / CONFIG_FILE) == request.config


def test_shipped_folder_cannot_hide_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("code")
    (tmp_path / ".gitignore").write_text("*.json")
    (tmp_path / CONFIG_FILE).write_text("stale")
    request = prepare(config(), working_dir=tmp_path)
    jobs = Jobs(request, taken=0)
    submit(jobs, request)
    assert set(jobs.shipped) == {"net.py", ".gitignore", CONFIG_FILE}
    assert jobs.shipped[".gitignore"].splitlines() == ["*.json", f"!{CONFIG_FILE}"]
    assert json.loads(jobs.shipped[CONFIG_FILE])["run"] == "first"
    assert (tmp_path / CONFIG_FILE).read_text() == "stale"
