from pathlib import Path

import pytest

from nf_pipeline.config import RunConfig, field_names, images_config, resolve_config
from nf_pipeline.errors import ConfigError

BUDGET = {"memory.budget_bytes": "2MiB"}


def test_budget_is_the_only_required_setting() -> None:
    assert resolve_config(flags=BUDGET).memory.budget_bytes == 2 * 2**20
    with pytest.raises(ConfigError, match="memory") as caught:
        resolve_config()
    assert "--memory-budget" in caught.value.fix


def test_flags_win_over_assignments_and_assignments_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[train]\nepochs = 3\nlr = 0.2\nseed = 7\n[memory]\nbudget_bytes = "1MiB"\n')
    config = resolve_config(file=file, assignments=["train.lr=0.3", "train.epochs=4"], flags={"train.epochs": 5})
    assert (config.train.epochs, config.train.lr, config.train.seed) == (5, 0.3, 7)
    assert config.memory.budget_bytes == 2**20


def test_file_whose_name_ends_in_json_is_read_as_json(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    config = resolve_config(flags={**BUDGET, "train.epochs": 3, "data.source": "s3://bucket/images"})
    file.write_text(config.model_dump_json())
    assert resolve_config(file=file) == config
    for text in ("[]", "{", "epochs = 3"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json"):
            resolve_config(file=file)


def test_assignment_values_may_be_plain_text() -> None:
    config = resolve_config(assignments=["data.source=s3://bucket/images", "train.head=classic"], flags=BUDGET)
    assert (config.data.source, config.train.head) == ("s3://bucket/images", "classic")


def test_unknown_setting_is_an_error_that_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch") as caught:
        resolve_config(assignments=["train.epoch=3"], flags=BUDGET)
    assert "train.epochs" in caught.value.fix


@pytest.mark.parametrize(
    "assignment",
    [
        "train.epochs=0",
        "train.lr=-1",
        "train.precision=fp8",
        "data.val_fraction=1.5",
        "memory.budget_bytes=lots",
        "memory.budget_bytes=0",
        "storage.codec=gzip",
        "storage.shard_bytes=1",
        "run=../up",
        "train=3",
        "train.lr=nan",
        "train.mixup=0.001",
    ],
)
def test_value_out_of_range_is_an_error_that_names_the_field(assignment: str) -> None:
    flags = {} if assignment.startswith("memory") else BUDGET
    with pytest.raises(ConfigError) as caught:
        resolve_config(assignments=[assignment], flags=flags)
    assert assignment.split("=")[0].split(".")[-1] in str(caught.value)


def test_assignment_without_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no '='"):
        resolve_config(assignments=["train.epochs"], flags=BUDGET)


def test_unreadable_config_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    for file in (broken, tmp_path / "absent.toml"):
        with pytest.raises(ConfigError, match=file.name):
            resolve_config(file=file)


def test_fingerprint_ignores_where_a_run_is_stored_and_executed() -> None:
    base = resolve_config(flags=BUDGET)
    moved = resolve_config(
        flags={
            **BUDGET,
            "run": "other",
            "storage.uri": "s3://b/p",
            "cluster.executor": "inline",
            "data.decode_threads": 9,
            "storage.keep_activations": "none",
        }
    )
    assert moved.fingerprint == base.fingerprint


CANNOT_CHANGE_THE_RESULT = (
    *("run", "cluster", "storage.uri", "data.decode_threads", "storage.keep_activations"),
    "exits.patience",  # it decides how many blocks there are, not what is in one
)


@pytest.mark.parametrize("name", [n for n in field_names() if not n.startswith(CANNOT_CHANGE_THE_RESULT)])
def test_fingerprint_changes_with_every_setting_that_can_change_the_result(name: str) -> None:
    other = {
        "data.source": "/images",
        "data.image_column": "image",
        "data.label_column": "label",
        "data.image_size": 16,
        "data.on_bad_image": "skip",
        "data.target": "values",
        "data.num_tokens": 100,
        "data.pixels": "uint16",
        "train.mode": "pipelined",
        "train.augment": "flip",
        "train.feature_augment": "flip",
        "data.max_train_images": 100,
        "model.name": "vgg11_bn",
        "train.head": "classic",
        "train.loss": "predsim",
        "train.context": "sample",
        "train.label_smoothing": 0.1,
        "train.local": "layer",
        "train.unit_layers": 3,
        "train.precision": "bf16",
        "train.device": "cpu",
        "storage.dtype": "float32",
        "storage.codec": "zstd",
        "storage.cache": "shards",
        "storage.shard_bytes": "1MiB",
        "memory.budget_bytes": "3MiB",
        "data.val_fraction": 0.2,
        "data.test_fraction": 0.2,
        "train.momentum": 0.5,
        "train.weight_decay": 0.1,
        "exits.confidence": 0.9,
        "exits.keep": "all",
    }
    given = {**BUDGET, "train.augment": "crop_flip"}  # as several views need one
    base = resolve_config(flags=given)
    section, field = name.split(".")
    value = other.get(name)
    if value is None:
        value = getattr(getattr(base, section), field) + 1
        if name in ("memory.safety_margin", "memory.join_threshold"):
            value = 0.11
    changed = resolve_config(flags={**given, name: value})
    assert changed.fingerprint != base.fingerprint


def test_config_is_frozen() -> None:
    config = resolve_config(flags=BUDGET)
    with pytest.raises(ValueError, match="frozen"):
        config.run = "other"


def test_every_field_is_documented() -> None:
    for section in RunConfig.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {"itself": section})
        assert all(field.description for name, field in fields.items() if name != "itself")


@pytest.mark.parametrize(
    "settings", [{"source": "s3://user:secret@bucket/x"}, {"source": "x", "image_size": 0}, {"source": ""}]
)
def test_images_to_read_are_checked_like_those_to_train_on(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"data\.(source|image_size)") as caught:
        images_config(**settings)
    assert "secret" not in str(caught.value)
