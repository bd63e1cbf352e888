"""Credentials are nowhere in what a run leaves: store, output, Ray's files, errors, descriptions of work, jobs."""

import contextlib
import copy
import json
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from planted_run import PLANTED, SMALL, Planted, command

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import train
from nf_pipeline.driver.submit import ENTRYPOINT, prepare
from nf_pipeline.errors import ConfigError, NFError
from nf_pipeline.events import EpochDone, Event, StageFailed
from nf_pipeline.executors.inline import InlineExecutor
from nf_pipeline.storage import s3
from nf_pipeline.storage.store import open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3]

FACTORY = """
import os

def make(num_classes, image_shape):
    raise RuntimeError("cannot log in with " + os.environ["DATABASE_PASSWORD"] + " at " + os.environ["HTTPS_PROXY"])
"""


def found_in(data: bytes | str, secrets: tuple[str, ...]) -> list[str]:
    """Lists the secrets that stand in some data, as they are or as JSON, URLs and reprs write them."""
    text = data if isinstance(data, str) else data.decode("latin1")
    forms = {secret: {secret, json.dumps(secret)[1:-1], secret.replace("/", "%2F")} for secret in secrets}
    return [secret for secret, written in forms.items() if any(form in text for form in written)]


def faces_of(error: BaseException) -> str:
    """Returns all that a program can show of an error: text, repr, fields, the errors behind it, its pickle."""
    chain, texts = [error], []
    while chain:
        current = chain.pop()
        texts += [str(current), repr(current), repr(current.args), repr(vars(current))]
        chain += [linked for linked in (current.__cause__, current.__context__) if linked is not None]
    texts += ["".join(traceback.format_exception(error)), pickle.dumps(error).decode("latin1")]
    return "\n".join(texts)


def test_finished_run_leaves_no_secret_in_its_store(planted: Planted) -> None:
    objects = planted.objects()
    assert len(objects) > 10
    assert {
        key: found_in(data, planted.secrets) for key, data in objects.items() if found_in(data, planted.secrets)
    } == {}


def test_finished_run_leaves_no_secret_in_files_of_ray(planted: Planted) -> None:
    files = [path for path in planted.ray_folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name.startswith("worker-") for path in files) and any("raylet" in path.name for path in files)
    leaks = {str(path): found_in(path.read_bytes(), planted.secrets) for path in files}
    assert {path: secrets for path, secrets in leaks.items() if secrets} == {}


def test_commands_print_no_secret_even_when_they_fail(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "leaky_network.py").write_text(FACTORY, encoding="utf8")
    uri, own = f"{planted.store_uri}/first", ("--store", planted.store_uri)
    new = ("train", "--debug", "--executor", "inline", *SMALL)
    password, signature = f"http://me:{PLANTED[1]}@127.0.0.1:9", f"http://127.0.0.1:9/?X-Amz-Signature={PLANTED[1]}"
    leaky = ("--run", "second", "--model", "leaky_network:make")
    # exit code, arguments, changes to the environment
    cases: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
        "status": (0, ("status", uri, "--json"), {}),
        "doctor": (0, ("doctor", *own, "--json"), {}),
        "plan": (0, ("plan", "--memory-budget", "4MiB", "--json"), {}),
        "bucket": (4, (*new, "--store", "s3://bucket-of-nobody/runs"), {}),
        "key": (4, (*new, *own), {"AWS_SECRET_ACCESS_KEY": PLANTED[0], "AWS_SESSION_TOKEN": PLANTED[0]}),
        "password": (2, (*new, *own), {"AWS_ENDPOINT_URL": password}),
        "signature": (2, (*new, *own), {"AWS_ENDPOINT_URL": signature}),
        "data": (2, (*new, *own, "--data", f"https://me:{PLANTED[1]}@images.example/birds"), {}),
        "uri": (2, ("status", f"s3://{PLANTED[1]}:{PLANTED[1]}@bucket/run"), {}),
        "env": (2, ("submit", "--memory-budget", "4MiB", "--env", "AWS_SECRET_ACCESS_KEY"), {}),
        "worker": (2, (*new, *own, *leaky), {"PYTHONPATH": str(tmp_path)}),
    }
    with ThreadPoolExecutor(2) as pool:
        run = {
            name: pool.submit(command, planted.environment | env, *words) for name, (_, words, env) in cases.items()
        }
    answers = {name: future.result() for name, future in run.items()}
    planted.outputs.update({name: output for name, (_, output) in answers.items()})
    assert {name: code for name, (code, _) in answers.items()} == {name: case[0] for name, case in cases.items()}, (
        answers
    )
    assert [name for name, (code, output) in answers.items() if code and "Fix:" not in output] == []
    assert "cannot log in with ***" in planted.outputs["worker"]
    leaks = {name: found_in(output, planted.secrets) for name, output in planted.outputs.items()}
    assert {name: secrets for name, secrets in leaks.items() if secrets} == {}
    assert [key for key, data in planted.objects().items() if found_in(data, planted.secrets)] == []


class Relay:
    """Forwards a port of this machine to another one until it is cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Closes everything: connections break, new ones are refused."""
        for end in (self._listener, *self._ends):
            close(end)

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            theirs = socket.create_connection(self._target)
            self._ends += [ours, theirs]
            for source, sink in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    close(sink)


def close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def secretive(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> Planted:
    """The same secrets in the environment of this process."""
    for name, value in planted.environment.items():
        if name.startswith("AWS_") or name in (
            "DATABASE_PASSWORD",
            "HF_TOKEN",
            "SIGNED_URL",
            "NO_PROXY",
            "HTTPS_PROXY",
        ):
            monkeypatch.setenv(name, value)
    return planted


def config_in(store_uri: str, run: str) -> RunConfig:
    flags = {"storage.uri": store_uri, "run": run, "memory.budget_bytes": "4MiB", "data.max_train_images": 200}
    small = {"train.epochs": 1, "train.device": "cpu", "cluster.num_threads": 1, "cluster.executor": "inline"}
    return resolve_config(flags=flags | small)


def test_store_that_breaks_off_leaves_no_secret_in_errors_events_and_descriptions_of_work(
    secretive: Planted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    host, _, port = secretive.environment["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    relay, events, sent = Relay((host, int(port))), [], []
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    monkeypatch.setattr(s3, "OUTAGE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    run_inline = InlineExecutor.run

    def recorded(self: InlineExecutor, name: str, stage: str, task: Any, *rest: Any) -> Iterator[Event]:
        sent.append(pickle.dumps(task))
        return run_inline(self, name, stage, task, *rest)

    monkeypatch.setattr(InlineExecutor, "run", recorded)

    def cut(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochDone):
            relay.cut()

    with pytest.raises(NFError) as caught:
        train(config_in(secretive.store_uri, "broken"), on_event=cut)
    assert any(isinstance(event, StageFailed) for event in events) and len(sent) >= 3
    secrets = secretive.secrets
    assert found_in(faces_of(caught.value), secrets) == []
    assert [found_in(data, secrets) for data in sent if found_in(data, secrets)] == []
    assert found_in(json.dumps([event.to_json() for event in events]), secrets) == []
    assert found_in("".join(capfd.readouterr()), secrets) == []


def test_refused_store_leaves_no_secret_in_the_error(secretive: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED[1])
    with pytest.raises(NFError) as caught:
        open_store(secretive.store_uri).get("anything")
    again = copy.copy(pickle.loads(pickle.dumps(caught.value)))
    for error in (caught.value, again):
        assert found_in(faces_of(error), secretive.secrets) == []


def test_store_and_its_client_hold_no_secret_when_they_travel(secretive: Planted) -> None:
    store = open_store(secretive.store_uri)
    assert found_in(pickle.dumps(store), secretive.secrets) == []
    assert found_in(repr(store) + repr(vars(store).get("uri")), secretive.secrets) == []


def test_job_carries_no_secret(secretive: Planted) -> None:
    os.environ["NF_TEST_VALUE"] = "kept"
    try:
        request = prepare(
            config_in(secretive.store_uri, "job").model_copy(update={"cluster": _ray()}), ["NF_TEST_VALUE"]
        )
    finally:
        del os.environ["NF_TEST_VALUE"]
    sent = [ENTRYPOINT, repr(request), json.dumps(request.metadata), request.config.model_dump_json()]
    assert found_in("\n".join(sent), secretive.secrets) == []
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "DATABASE_PASSWORD",
        "HTTPS_PROXY",
        "SIGNED_URL",
    ):
        with pytest.raises(ConfigError) as caught:
            prepare(request.config, [name])
        assert found_in(faces_of(caught.value), secretive.secrets) == []


def _ray() -> Any:
    return resolve_config(flags={"memory.budget_bytes": 1}).cluster


@pytest.mark.parametrize("field", ["storage.uri", "data.source", "cluster.address"])
@pytest.mark.parametrize("place", ["s3://me:{}@bucket/x", "https://host/x?X-Amz-Signature={}&y=1"])
def test_setting_with_a_credential_is_refused_before_it_is_stored(field: str, place: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        resolve_config(flags={"memory.budget_bytes": 1, field: place.format(PLANTED[1])})
    assert found_in(str(caught.value) + repr(caught.value.args), PLANTED) == []
