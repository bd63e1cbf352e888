"""run.json: the resolved configuration of a run, written once, checked whenever the run is continued."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from nf_pipeline.config import FORMAT_VERSION, RunConfig, validate_config
from nf_pipeline.data.sources import absolute_source
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, RunConflict
from nf_pipeline.plans import Plan
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory

PLAN_RECORD_KEYS = ("format_version", "fingerprint", "placed_on")
"""What plan.json says besides the plan: its version, what it was made for, the device that stages are placed on."""

_RECORDED_PACKAGES = ("nf_pipeline", "torch", "torchvision", "ray", "pyarrow", "s3fs")


def open_run(store: Store, layout: RunLayout, config: RunConfig, default_threads: int) -> RunConfig:
    """Creates the run's record, or checks that the one there describes the same work.

    As long as no block has begun, another configuration simply replaces the record: whoever follows the advice of
    an error about the budget, the model or the data goes on under the same name.

    Args:
        store, layout: of the run.
        config: as given.
        default_threads: of a worker, where neither the configuration nor an earlier start says.

    Returns:
        The configuration as workers need it: the store and local data by absolute path, the number of threads
        fixed (that of the run's first start unless one is given, because it decides the last bits of the result).

    Raises:
        RunConflict: blocks of another configuration have the name.
    """
    recorded = read_json(store, layout.run_json)
    config = _settled(store, config, recorded, default_threads)
    if recorded is not None and recorded.get("fingerprint") == config.fingerprint:
        return config
    if recorded is not None:
        if store.list(layout.blocks):
            raise _conflict(store, config, recorded)
        store.delete([layout.plan_json, *_stale_ingest(layout, config, recorded)])
    record = {
        "format_version": FORMAT_VERSION,
        "run": config.run,
        "fingerprint": config.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    store.put(layout.run_json, json.dumps(record, indent=2).encode())
    return config


def _settled(store: Store, config: RunConfig, recorded: dict[str, Any] | None, default_threads: int) -> RunConfig:
    there = ((recorded or {}).get("config") or {}).get("cluster") or {}
    threads = config.cluster.num_threads or there.get("num_threads") or default_threads
    return config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"uri": store.uri}),
            "data": config.data.model_copy(update={"source": absolute_source(config.data.source)}),
            "cluster": config.cluster.model_copy(update={"num_threads": threads}),
        }
    )


def _stale_ingest(layout: RunLayout, config: RunConfig, recorded: dict[str, Any]) -> list[str]:
    """Returns the ingest manifest's key if its images were read with other settings."""

    def read_with(document: dict[str, Any]) -> tuple[Any, ...]:
        data, train, storage = (document.get(section) or {} for section in ("data", "train", "storage"))
        return data, train.get("seed"), storage.get("shard_bytes")

    same = read_with(config.model_dump(mode="json")) == read_with(recorded.get("config") or {})
    return [] if same else [layout.ingest_manifest]


def load_run(uri: str, cluster: Mapping[str, Any] | None = None, model: str | None = None) -> RunConfig:
    """Reads a run's configuration back.

    Args:
        uri: STORE/NAME.
        cluster: settings that replace recorded ones of the section `cluster`.
        model: the factory, where the run was started with one.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: run.json cannot be read.
        ConfigError: the run names a factory that `model` does not.
    """
    store_uri, run = split_run_uri(uri)
    store = open_store(store_uri)
    record = read_json(store, RunLayout(run).run_json)
    if record is None:
        raise ObjectMissing(f"there is no run {run!r}", store.uri, "check the name, or start it with train")
    try:
        document = {**record["config"]}
    except (KeyError, TypeError):
        raise ObjectCorrupt("run.json holds no configuration", f"{store.uri}/{run}") from None
    # A run that was copied or moved is where it is found, not where it was written.
    document["storage"] = {**document.get("storage", {}), "uri": store.uri}
    document["run"] = run
    document["cluster"] = {**(document.get("cluster") or {}), **(cluster or {})}
    config = validate_config(document)
    confirm_factory(config.model.name, model)
    return config


def load_plan(store: Store, layout: RunLayout) -> Plan:
    """Reads a run's plan.

    Raises:
        ObjectMissing: the run has not been planned.
        ObjectCorrupt: plan.json cannot be read.
    """
    document = read_json(store, layout.plan_json)
    if document is None:
        raise ObjectMissing(f"{layout.plan_json} is not there", store.uri, "resume the run: it is planned then")
    return plan_of(document, store.uri)


def plan_of(document: dict[str, Any], store_uri: str) -> Plan:
    """Takes the plan out of plan.json, which adds `PLAN_RECORD_KEYS`.

    Raises:
        ObjectCorrupt: fields are missing or of another kind.
    """
    planned = {key: value for key, value in document.items() if key not in PLAN_RECORD_KEYS}
    try:
        return Plan.from_json(planned)
    except (AttributeError, KeyError, TypeError) as error:
        raise ObjectCorrupt(f"plan.json is damaged: {error}", store_uri, "delete it and resume") from None


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Reads a JSON object, None if there is none.

    Raises:
        ObjectCorrupt: it is not a JSON object.
    """
    try:
        document = json.loads(bytes(store.get(key)))
    except ObjectMissing:
        return None
    except ValueError as error:
        raise ObjectCorrupt(
            f"{key} is not JSON: {error}", store.uri, f"repair or delete {key}, then train again"
        ) from None
    if not isinstance(document, dict):
        raise ObjectCorrupt(f"{key} is a JSON {type(document).__name__}, want an object", store.uri)
    return document


def _conflict(store: Store, config: RunConfig, recorded: dict[str, Any]) -> RunConflict:
    there = recorded.get("config") or {}
    differences = [
        f"{section}.{field}: there {there.get(section, {}).get(field)!r}, here {value!r}"
        for section, values in config.model_dump(mode="json").items()
        if isinstance(values, dict) and section != "cluster"
        for field, value in values.items()
        if (section, field) != ("storage", "uri") and there.get(section, {}).get(field) != value
    ]
    return RunConflict(
        f"run {config.run!r} at {store.uri} has blocks of another configuration: {'; '.join(differences)}",
        "another --run name, or the same settings to continue it",
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
