"""Whatever a configuration file, an assignment or a name holds, the user gets a ConfigError or a configuration."""

import json
from pathlib import Path
from typing import Any

from cases import documented, fuzz, scratch_folder
from hypothesis import strategies as st
from junk import as_json, leaves, odd_floats, odd_ints, odd_json, odd_texts

from nf_pipeline.config import RunConfig, field_names, resolve_config, validate_config
from nf_pipeline.errors import ConfigError
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.store import open_store
from nf_pipeline.units import format_bytes, parse_bytes

FIELDS = field_names()
SECTIONS = sorted({name.partition(".")[0] for name in FIELDS})
fields = st.one_of(st.sampled_from(FIELDS), st.sampled_from(SECTIONS), odd_texts)


@st.composite
def config_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Nested mappings with the real names of sections and fields, and anything as their values."""
    document: dict[str, Any] = {"memory": {"budget_bytes": "64MiB"}}
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=4)):
        section, _, name = field.partition(".")
        value = draw(st.one_of(leaves, odd_json))
        if not name:
            document[section] = value
        elif isinstance(document.setdefault(section, {}), dict):
            document[section][name] = value
    if draw(st.integers(0, 4)) == 0:
        document[draw(st.one_of(st.sampled_from(SECTIONS), odd_texts))] = draw(odd_json)
    return document


def toml_of(value: Any) -> str:
    """Writes TOML that is nearly right: floats, texts and numbers as Python prints them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml_of(inner)}' for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**4000 else "1" + "0" * 5000  # more than Python converts
    return str(value).lower() if isinstance(value, bool) else repr(value)


def checked(outcome: Any) -> None:
    assert isinstance(outcome, RunConfig | ConfigError)
    if isinstance(outcome, RunConfig):
        assert outcome.fingerprint and json.dumps(outcome.model_dump(mode="json"))
        budget = outcome.memory.budget_bytes
        assert budget == "auto" or 1 <= budget < 2**63


@fuzz("config: documents", quick=300, thorough=6_000, document=config_documents())
def test_fuzz_config_document_of_any_content_is_accepted_or_explained(document: dict[str, Any]) -> None:
    checked(documented(lambda: validate_config(document)))


@fuzz("config: JSON files", quick=100, thorough=2_000, document=st.one_of(config_documents(), odd_json))
def test_fuzz_config_json_file_of_any_content_is_accepted_or_explained(document: Any) -> None:
    file = scratch("run.json")
    file.write_bytes(as_json(document))
    checked(documented(lambda: resolve_config(file=file)))


@fuzz("config: TOML files", quick=100, thorough=2_000, document=config_documents())
def test_fuzz_config_toml_file_of_any_content_is_accepted_or_explained(document: dict[str, Any]) -> None:
    file = scratch("run.toml")
    lines = [f"{section} = {toml_of(values)}" for section, values in document.items()]
    file.write_text("\n".join(lines), encoding="utf8", errors="surrogatepass")
    checked(documented(lambda: resolve_config(file=file)))


@fuzz(
    "config: bytes",
    quick=100,
    thorough=4_000,
    data=st.binary(max_size=200),
    name=st.sampled_from(["x.toml", "x.json"]),
)
def test_fuzz_config_file_of_any_bytes_is_explained(data: bytes, name: str) -> None:
    file = scratch(name)
    file.write_bytes(data)
    outcome = documented(lambda: resolve_config(file=file))
    assert isinstance(outcome, ConfigError)


@fuzz(
    "config: --set",
    quick=300,
    thorough=6_000,
    field=fields,
    value=st.one_of(odd_texts, odd_ints.map(lambda n: f"{n:x}"), odd_floats.map(str)),
)
def test_fuzz_config_assignment_of_any_text_is_accepted_or_explained(field: str, value: str) -> None:
    budget = {"memory.budget_bytes": "1MiB"}
    checked(documented(lambda: resolve_config(assignments=[f"{field}={value}"], flags=budget)))
    checked(documented(lambda: resolve_config(assignments=[field + value, value], flags=budget)))


budgets = st.one_of(
    odd_texts, odd_ints, odd_floats, st.integers(0, 2**64), st.integers(0, 2**70).map(lambda n: f"{n}KiB")
)


@fuzz("units: byte counts", quick=300, thorough=10_000, value=budgets)
def test_fuzz_byte_count_is_a_number_below_2_63_or_a_value_error(value: Any) -> None:
    try:
        num_bytes = parse_bytes(value)
    except ValueError as error:
        assert "want" in str(error)
        return
    assert type(num_bytes) is int and 1 <= num_bytes < 2**63
    assert format_bytes(num_bytes)


@fuzz("config: budgets", quick=150, thorough=4_000, value=budgets)
def test_fuzz_budget_of_any_value_is_accepted_or_explained(value: Any) -> None:
    checked(documented(lambda: resolve_config(flags={"memory.budget_bytes": value})))


@fuzz(
    "names: runs and stores",
    quick=300,
    thorough=10_000,
    text=st.one_of(odd_texts, st.tuples(odd_texts, odd_texts).map("/".join)),
)
def test_fuzz_run_and_store_names_of_any_text_are_accepted_or_explained(text: str) -> None:
    documented(lambda: split_run_uri(text))
    outcome = documented(lambda: open_store(text))
    if not isinstance(outcome, Exception) and not text.lower().startswith("s3:"):
        documented(lambda: outcome.get("absent/" + "x" * 10))
        documented(lambda: outcome.size("absent"))
    documented(lambda: resolve_config(flags={"memory.budget_bytes": 1, "run": text}))


def scratch(name: str) -> Path:
    """Returns a file of this process that every case writes anew."""
    return scratch_folder() / name
