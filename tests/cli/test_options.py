"""Every named flag reaches its configuration field, and its help says what the configuration says."""

import typing
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from nf_pipeline.cli.options import CONFIG_FLAGS, ConfigFlag, KeepPolicy, StopPolicy, config_from, config_options
from nf_pipeline.config import RunConfig, field_names
from nf_pipeline.errors import ConfigError

# As typed on the command line, and what the configuration must then hold: never the default.
SAMPLES: dict[str, tuple[str, Any]] = {
    "--data": ("./images", "./images"),
    "--model": ("vgg16_bn", "vgg16_bn"),
    "--memory-budget": ("300MiB", 300 * 2**20),
    "--store": ("s3://bucket/prefix", "s3://bucket/prefix"),
    "--run": ("second", "second"),
    "--executor": ("inline", "inline"),
    "--address": ("ray-head:6379", "ray-head:6379"),
    "--image-size": ("48", 48),
    "--max-train-images": ("1000", 1000),
    "--on-bad-image": ("skip", "skip"),
    "--epochs": ("3", 3),
    "--views": ("2", 2),
    "--mode": ("pipelined", "pipelined"),
    "--workers-per-block": ("2", 2),
    "--seed": ("17", 17),
    "--device": ("cpu", "cpu"),
    "--keep": ("activations=last", "last"),
    "--stop": ("patience=3", 3),
    "--exits": ("all", "all"),
    "--cache": ("recompute", "recompute"),
    "--local": ("layer", "layer"),
}

# What else must be set for a flag to make sense.
NEEDED = {"--views": ("--set", "train.augment=flip")}


def parse(*arguments: str) -> RunConfig:
    seen: list[RunConfig] = []

    @click.command()
    @config_options
    def probe(**given: Any) -> None:
        seen.append(config_from(given))

    outcome = CliRunner().invoke(probe, list(arguments))
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return seen[0]


def field_of(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def field_info(dotted: str) -> Any:
    section, _, field = dotted.partition(".")
    info = RunConfig.model_fields[section]
    return info.annotation.model_fields[field] if field else info


def test_samples_cover_every_flag() -> None:
    assert set(SAMPLES) == {flag.name for flag in CONFIG_FLAGS}


def test_flags_set_distinct_known_fields() -> None:
    fields = [flag.field for flag in CONFIG_FLAGS]
    assert set(fields) <= set(field_names())
    assert len(set(fields)) == len(fields)


@pytest.mark.parametrize("flag", CONFIG_FLAGS, ids=lambda flag: flag.name)
def test_flag_reaches_its_field_and_no_other(flag: ConfigFlag) -> None:
    text, wanted = SAMPLES[flag.name]
    budget, needed = ("--memory-budget", "1GiB"), NEEDED.get(flag.name, ())
    config = parse(*(() if flag.name == "--memory-budget" else budget), *needed, flag.name, text)
    assert field_of(config, flag.field) == wanted
    plain = parse(*budget, *needed)
    changed = {name for name in field_names() if field_of(config, name) != field_of(plain, name)}
    assert changed == {flag.field}


@pytest.mark.parametrize(
    "flag",
    [flag for flag in CONFIG_FLAGS if isinstance(flag.value_type, click.Choice)],
    ids=lambda flag: flag.name,
)
def test_choices_of_a_flag_are_those_of_its_field(flag: ConfigFlag) -> None:
    assert set(flag.value_type.choices) == set(typing.get_args(field_info(flag.field).annotation))


@pytest.mark.parametrize("flag", [flag for flag in CONFIG_FLAGS if flag.default], ids=lambda flag: flag.name)
def test_default_in_help_is_the_field_default(flag: ConfigFlag) -> None:
    default = field_info(flag.field).default
    # None means that something follows from the rest of the configuration: the help says what, in words.
    assert (flag.default in (str(default), f"patience={default}")) if default is not None else flag.default


@pytest.mark.parametrize("flag", [flag for flag in CONFIG_FLAGS if not flag.default], ids=lambda flag: flag.name)
def test_flag_without_default_in_help_has_none(flag: ConfigFlag) -> None:
    info = field_info(flag.field)
    assert info.is_required() or info.default is None


def test_policies_of_keep_are_those_of_the_field() -> None:
    assert set(KeepPolicy.policies) == set(typing.get_args(field_info("storage.keep_activations").annotation))


@pytest.mark.parametrize("text", ["last", "activations", "activations=some", "images=none", "=all", ""])
def test_keep_of_another_form_says_which_it_wants(text: str) -> None:
    with pytest.raises(click.BadParameter, match="want activations=all or activations=last or activations=none"):
        KeepPolicy().convert(text, None, None)


def test_stop_never_reaches_the_field_as_none() -> None:
    assert parse("--memory-budget", "1GiB", "--stop", "never").exits.patience is None
    assert parse("--memory-budget", "1GiB", "--set", "exits.patience=never").exits.patience is None


@pytest.mark.parametrize("text", ["2", "patience", "patience=0", "patience=-1", "patience=soon", "always", ""])
def test_stop_of_another_form_says_which_it_wants(text: str) -> None:
    with pytest.raises(click.BadParameter, match="want patience=N with N of 1 or more, or never"):
        StopPolicy().convert(text, None, None)


def test_flag_wins_over_set_and_set_over_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[memory]\nbudget_bytes = "1GiB"\n[train]\nepochs = 1\nseed = 1\nhead = "classic"\n')
    config = parse("--config", str(file), "--set", "train.epochs=2", "--set", "train.seed=2", "--seed", "3")
    assert (config.train.head, config.train.epochs, config.train.seed) == ("classic", 2, 3)


def test_missing_budget_is_a_config_error_that_gives_the_flag() -> None:
    with pytest.raises(ConfigError, match="--memory-budget 300MiB"):
        parse("--data", "digits")


def test_missing_config_file_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        parse("--config", str(tmp_path / "absent.toml"))
