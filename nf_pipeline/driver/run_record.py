"""run.json, the resolved configuration of a run, and plan.json: written once, checked whenever they are read.

plan.json holds the configuration a second time: a run.json that is damaged, or another run's, can be written again.
Entries: `open_run`, `load_run`, `load_plan`.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from nf_pipeline.config import FORMAT_VERSION, RunConfig, field_names, validate_config
from nf_pipeline.data.sources import absolute_source
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing, OtherVersion, RunConflict
from nf_pipeline.plans import Plan
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.sealed import read_sealed, repair_command, seal
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory
from nf_pipeline.worker.tasks import block_fingerprint, num_rounds

PLAN_RECORD_KEYS = ("format_version", "fingerprint", "placed_on", "config")
"""What plan.json says besides the plan: its version, what it was made for, the device that stages are placed on."""

_NOT_COMPARED = (("storage", "uri"), ("storage", "keep_activations"), ("exits", "patience"))
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
    recorded = read_run(store, layout)
    config = _settled(store, config, recorded, default_threads)
    if recorded is not None and recorded.get("fingerprint") == config.fingerprint:
        return config
    if recorded is not None:
        if store.list(layout.blocks):
            raise _conflict(store, config, recorded)
        store.delete([layout.plan_json, *_stale_ingest(layout, config, recorded)])
    store.put(layout.run_json, seal(_record_of(config)))
    return config


def _record_of(config: RunConfig) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "run": config.run,
        "fingerprint": config.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **_versions()},
    }


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


def load_run(
    uri: str,
    cluster: Mapping[str, Any] | None = None,
    model: str | None = None,
    keep: str | None = None,
    *,
    repair: bool = False,
) -> RunConfig:
    """Reads a run's configuration back.

    Args:
        uri: STORE/NAME.
        cluster: settings that replace recorded ones of the section `cluster`.
        model: the factory, where the run was started with one.
        keep: replaces the recorded `storage.keep_activations`.
        repair: go by plan.json where run.json is damaged; see `find_record`.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: run.json is missing, damaged, or not the one that the blocks were trained by.
        ConfigError: the run names a factory that `model` does not.
    """
    store_uri, run = split_run_uri(uri)
    store = open_store(store_uri)
    record, problem = find_record(store, RunLayout(run))
    if problem and not repair:
        raise ObjectCorrupt(problem, store.uri, _record_fix(store, RunLayout(run)))
    if record is None:
        raise ObjectMissing(f"there is no run {run!r}", store.uri, "check the name, or start it with train")
    document = {**record["config"]}
    # A run that was copied or moved is where it is found, not where it was written.
    policy = {"keep_activations": keep} if keep is not None else {}
    document["storage"] = {**document.get("storage", {}), "uri": store.uri, **policy}
    document["run"] = run
    document["cluster"] = {**(document.get("cluster") or {}), **(cluster or {})}
    config = validate_config(document)
    confirm_factory(config.model.name, model)
    return config


def load_plan(store: Store, layout: RunLayout) -> Plan:
    """Reads a run's plan.

    Raises:
        ObjectMissing: the run has not been planned.
        ObjectCorrupt: plan.json is damaged.
    """
    document = read_sealed(store, layout.plan_json)
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
    except ValueError as error:
        fix = "delete it and resume: the run is planned anew"
        raise ObjectCorrupt(f"plan.json is damaged: {error}", store_uri, fix) from None


def plan_record(config: RunConfig, fingerprint: str, placed_on: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Returns what plan.json is to hold.

    Args:
        config: of the run, as workers get it.
        fingerprint: of the plan, see `plan_fingerprint`.
        placed_on: device that stages are placed on.
        planned: as `Plan.to_json` returns it.
    """
    record = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "placed_on": placed_on}
    return {**record, "config": config.model_dump(mode="json"), **planned}


def read_run(store: Store, layout: RunLayout) -> dict[str, Any] | None:
    """Reads run.json, None if there is none.

    Raises:
        ObjectCorrupt: it was changed.
        RunConflict: it is another run's.
        OtherVersion: another version of this program wrote it.
    """
    try:
        record = read_sealed(store, layout.run_json)
    except OtherVersion:
        raise
    except ObjectCorrupt as error:
        raise ObjectCorrupt(error.what, store.uri, _record_fix(store, layout)) from None
    if record is None:
        return None
    run = record.get("run")
    if not _has_sections(record.get("config")):
        raise ObjectCorrupt(f"{layout.run_json} holds no configuration", store.uri, _record_fix(store, layout))
    if run != layout.run:
        what = f"{layout.run_json} at {store.uri} is that of run {run!r}, whose manifests name their objects by it"
        raise RunConflict(
            what, f"move the run back to {run}; if only run.json is wrong: {_record_fix(store, layout)}"
        )
    return record


def _has_sections(config: Any) -> bool:
    sections = [name.partition(".")[0] for name in field_names() if "." in name]
    return isinstance(config, dict) and all(isinstance(config.get(name, {}), dict) for name in sections)


def find_record(store: Store, layout: RunLayout) -> tuple[dict[str, Any] | None, str]:
    """Finds the record to go by when a run is repaired.

    Returns:
        What run.json says or, where that is damaged or another run's, what it must have said as plan.json knows it;
        None if there is no record at all. And what is wrong with run.json, "" if nothing.

    Raises:
        ObjectCorrupt: run.json is damaged and plan.json does not help.
        RunConflict: the whole run is that of another name.
        OtherVersion: another version of this program wrote the run.
    """
    planned = _planned_record(store, layout)
    try:
        record = read_run(store, layout)
    except (ObjectCorrupt, RunConflict) as error:
        if planned is None or planned["run"] != layout.run:
            raise
        return planned, error.what
    if planned is None or (record is not None and record.get("fingerprint") == planned["fingerprint"]):
        return record, ""
    if record is None:
        return planned, f"{layout.run_json} is missing"
    if _fits_blocks(store, layout):
        found, wanted = record.get("fingerprint"), planned["fingerprint"]
        return planned, f"{layout.run_json}: fingerprint: got {found}, want {wanted} as in plan.json and the blocks"
    return record, ""


def _record_fix(store: Store, layout: RunLayout) -> str:
    planned = _planned_record(store, layout)
    if planned is None or planned["run"] != layout.run:
        return f"delete {layout.run_json} and give the train command again that began the run: what fits it is kept"
    return f"{repair_command(store, layout.run)}, which writes it again as plan.json knows it"


def _planned_record(store: Store, layout: RunLayout) -> dict[str, Any] | None:
    try:
        document = read_sealed(store, layout.plan_json)
        return None if document is None else _record_of(validate_config(document["config"]))
    except (ObjectCorrupt, ConfigError, KeyError, TypeError):
        return None


def _fits_blocks(store: Store, layout: RunLayout) -> bool:
    """Tells whether blocks were trained as plan.json says: then it is the run's own."""
    document = read_sealed(store, layout.plan_json) or {}
    config = validate_config(document["config"])
    plan = plan_of(document, store.uri)
    for block_idx in range(len(plan.blocks)):
        try:
            manifest = read_manifest(store, layout.block_manifest(block_idx))
        except ObjectCorrupt:
            continue
        if manifest is not None:
            last = num_rounds(config) - 1
            return manifest.fingerprint == block_fingerprint(config, plan, block_idx, last, manifest.input_checksum)
    return False


def _conflict(store: Store, config: RunConfig, recorded: dict[str, Any]) -> RunConflict:
    there = recorded.get("config") or {}
    differences = [
        f"{section}.{field}: there {there.get(section, {}).get(field)!r}, here {value!r}"
        for section, values in config.model_dump(mode="json").items()
        if isinstance(values, dict) and section != "cluster"
        for field, value in values.items()
        if (section, field) not in _NOT_COMPARED and there.get(section, {}).get(field) != value
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
