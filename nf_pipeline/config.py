"""The configuration of a run: one dial, `memory.budget_bytes`; everything else has a default or follows.

Sections are frozen pydantic models with the doc string under each field. `resolve_config` merges a TOML file,
`--set` assignments and named flags (later ones win) and turns pydantic's complaints into `ConfigError`s that
name the field, what came and what is wanted. Knows nothing of torch, Ray or storage.
"""

import hashlib
import json
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from nf_pipeline.errors import ConfigError
from nf_pipeline.near_names import did_you_mean
from nf_pipeline.redact import holds_credentials, redacted
from nf_pipeline.units import parse_bytes

FORMAT_VERSION = 4
"""Of the documents of a run: run.json, plan.json, stages' manifests, summary.json, model.json. Another is refused."""

MAX_FILE_BYTES = 64 * 2**10
"""Size of a configuration file; one with every setting takes some 3 KiB."""

_SHOWN_CHARS = 80

ByteCount = Annotated[int, BeforeValidator(parse_bytes)]

AUTO: Final = "auto"
"""Value of `memory.budget_bytes` that leaves the budget to what the workers have."""

NEVER: Final = "never"
"""Value of `exits.patience` with which all blocks are trained, where None cannot be written."""


def _parse_budget(value: Any) -> Any:
    return AUTO if value == AUTO else parse_bytes(value)


def _refuse_credentials(value: str) -> str:
    if holds_credentials(value):
        raise ValueError("credentials do not belong here, the configuration is stored: give them by the environment")
    return value


def _parse_patience(value: Any) -> Any:
    return None if value == NEVER else value


Place = Annotated[str, AfterValidator(_refuse_credentials)]
Budget = Annotated[int | Literal["auto"], BeforeValidator(_parse_budget)]
Patience = Annotated[int | None, Field(ge=1, le=1000), BeforeValidator(_parse_patience)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # it may hold a credential
    )


class DataConfig(_Section):
    """Which samples, and how they are read and split."""

    source: Place = Field(default="digits", min_length=1)
    """Directory or URI of Parquet, image folder, torchvision data set name, or `digits`."""
    image_column: str | None = None
    """Parquet column with the image, or the tensor or tokens; found by its type when not given."""
    label_column: str | None = None
    """Parquet column with the label; `label`, `labels`, `target` or `class` when not given."""
    target: Literal["auto", "class", "values"] = "auto"
    """What labels are: classes, or values to predict; auto takes floating point numbers, and lists of numbers, for
    values, whole numbers and text for classes."""
    num_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """Tokens are whole numbers below this one; None: one more than the largest one in the data. Given, inputs of any
    whole numbers are tokens."""
    pixels: Literal["uint8", "uint16"] = "uint8"
    """Stored type of images: `uint16` keeps all bits of 16-bit grey, and scales 8 bits up."""
    image_size: int | None = Field(default=None, ge=1, le=4096)
    """Resize every image to this many pixels on both sides; required when sizes differ. Tensors are never resized."""
    val_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Part of the train split that becomes the validation split when the data brings none."""
    test_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Part of the train split that becomes the test split when the data brings none."""
    max_train_images: int | None = Field(default=None, ge=2, lt=2**63)
    """Seeded subset of the train split, stratified by class, validation included; None takes all."""
    on_bad_image: Literal["error", "skip"] = "error"
    """`skip` counts and lists images that cannot be decoded, and tensors with NaN, instead of ending the run."""
    decode_threads: int = Field(default=4, ge=1, le=256)
    """Threads that decode images in parallel."""


class ModelConfig(_Section):
    """Which network."""

    name: str | None = None
    """Registry name, `torchvision:NAME`, `timm:NAME` (the library's network with fresh weights; timm is an extra), or
    `package.module:factory`; None picks one that suits images, series or volumes."""


class MemoryConfig(_Section):
    """What a worker's training process may hold on its device."""

    budget_bytes: Budget
    """The dial: bytes, or text such as "300MiB"; "auto" takes the smallest class of workers that the cluster has.
    The CUDA context is not counted."""
    max_batch_size: int = Field(default=128, ge=1, le=65536)
    """Batches never grow beyond this, however much memory there is."""
    min_batch_size: int = Field(default=2, ge=2, le=65536)
    """A layer that cannot train with this many samples is a plan error."""
    good_batch_size: int = Field(default=32, ge=2, le=65536)
    """Batches from here on train well: a plan with a smaller one is taken only where no other fits."""
    safety_margin: float = Field(default=0.03, ge=0.0, le=0.5)
    """Part of the budget that plans leave free."""
    join_threshold: float = Field(default=0.4, ge=0.0, le=1.0)
    """Units join a block while their feasible batch differs by at most this part."""

    @model_validator(mode="after")
    def _order_batch_sizes(self) -> "MemoryConfig":
        if self.max_batch_size < self.min_batch_size:
            raise ValueError(f"max_batch_size {self.max_batch_size} is below min_batch_size {self.min_batch_size}")
        return self


class TrainConfig(_Section):
    """How each block is trained."""

    mode: Literal["sequential", "pipelined"] = "sequential"
    """`pipelined` trains all blocks at the same time, each on what the block before published in its latest round."""
    epochs: int = Field(default=8, ge=1, le=100_000)
    """Passes over the train split, per block."""
    round_epochs: int = Field(default=1, ge=1, le=100_000)
    """Pipelined only: epochs between two publications of a block's activations."""
    workers_per_block: int = Field(default=1, ge=1, le=256)
    """Workers that share a block's batches: the effective batch is as many times the planned one."""
    augment: Literal["none", "flip", "crop_flip", "color", "randaugment"] = "none"
    """Random changes of pictures: what starts from the images sees new ones every epoch, the rest every round.
    `color` (brightness, contrast, saturation) and `randaugment`, of 8 bits only, come on top of `crop_flip`."""
    views: int = Field(default=1, ge=1, le=100)
    """Passes over the train split, each with other random changes of the images, that a block's stored activations
    hold. Each epoch of the block that reads them reads one whole view, the next epoch the next one; what starts from
    the images sees new changes anyway. The first view of a sequential run is the images as they are."""
    feature_augment: Literal["none", "flip", "flip_shift"] = "none"
    """Random flips, and shifts by up to an eighth, of what pictures became, stored activation maps, as a block reads
    them, new ones every epoch: an approximation of flipped and shifted images that needs no storage."""
    local: Literal["auto", "layer", "block"] = "auto"
    """What plans are made of: `layer` gives every layer a head and a loss of its own (the paper's form), `block` as
    many layers as memory allows, with backpropagation inside, up to the whole network; auto takes the fastest."""
    unit_layers: int | None = Field(default=None, ge=1, le=1000)
    """Layers per local unit, with backpropagation inside. Given, nothing is timed, and the plan is the same wherever
    it is made; None leaves it to `local`."""
    head: str = "adaptive"
    """Auxiliary head of each unit: adaptive (linear where there is no room for it), auglocal, classic, linear or
    mlp_sr; auto takes for every unit the strongest with which its batch still trains well."""
    loss: str = "auto"
    """What units are trained for: of classes cross_entropy, predsim (similarity matching + cross-entropy) or infopro
    (reconstruction of the sample, less the deeper the unit, + cross-entropy; blocks then store samples beside
    activations; not of tokens), with which the last unit, which has the model's own classifier, still trains by
    cross-entropy alone; of values, standardised, mse, mae or huber; auto takes cross_entropy or mse."""
    context: Literal["none", "sample"] = "none"
    """`sample`: every unit but the first adds a learned encoding of the network's own sample to its input, while it
    trains and in the final model (ContSup). Blocks then store each sample beside its activations."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Part of every training label that is spread over all classes; values have none."""
    mixup: float = Field(default=0.0, ge=0.0, le=100.0)
    """Mixes what a block reads, samples or activations, in pairs while training, with shares from Beta(mixup, mixup);
    0 mixes nothing, as tokens need it. Below 0.01 nearly all shares would be 0 or 1, and draws are not exact."""
    lr: float = Field(default=0.05, gt=0.0, le=100.0)
    """Peak learning rate at batch 128; scales linearly with the block's batch size."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0.0, le=1.0)
    """L2 penalty."""
    warmup_epochs: float = Field(default=1.0, ge=0.0, le=100_000.0)
    """Linear warm-up before the cosine schedule, in epochs; at most half the schedule is used."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward and backward pass under autocast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Same seed and plan, same weights, whichever executor (on CPU bit for bit)."""

    @property
    def num_rounds(self) -> int:
        """How often a block publishes its activations: once, unless the run is pipelined."""
        return 1 if self.mode == "sequential" else -(-self.epochs // self.round_epochs)

    @field_validator("mixup")
    @classmethod
    def _mix_or_not(cls, value: float) -> float:
        if 0.0 < value < 0.01:
            raise ValueError("want 0, or 0.01 and more")
        return value

    @model_validator(mode="after")
    def _one_way_to_form_units(self) -> "TrainConfig":
        if self.unit_layers is not None and self.local == "block":
            raise ValueError("local=block forms units itself: leave out unit_layers")
        return self

    @model_validator(mode="after")
    def _read_every_view(self) -> "TrainConfig":
        name, num_epochs = "epochs", self.epochs
        if self.mode == "pipelined" and self.round_epochs < self.epochs:
            name, num_epochs = "round_epochs", self.round_epochs
        if self.views > 1 and self.augment == "none":
            raise ValueError(f"views {self.views} with augment none would all be the same: choose an augment")
        if self.views > num_epochs:
            raise ValueError(f"views {self.views}: an epoch reads one, {name} {num_epochs} would leave some unread")
        return self


class ExitsConfig(_Section):
    """How the final model's exit is chosen, on the validation split."""

    tolerance: float = Field(default=0.5, ge=0.0, le=100.0)
    """Percentage points of accuracy that the chosen exit may be below the best one; where values are predicted, per
    cent of the best one's error that it may be above it."""
    confidence: float = Field(default=0.95, gt=0.0, le=0.999999)
    """Level of the intervals around each exit's accuracy or error on validation, and of the test by which an exit
    counts as worse than the best one."""
    keep: Literal["chosen", "all"] = "chosen"
    """`all` also keeps the heads of the exits before the chosen one, with thresholds by which a sample leaves at the
    first exit that is sure enough; see `nf_pipeline.load_early_exit_model`. Of classes only."""
    patience: Patience = 2
    """The run ends when so many blocks in a row brought no exit beyond the validation noise; see
    `nf_pipeline.core.early_stop`. "never" trains all blocks. Only sequential runs can end early: a pipelined one
    trains all blocks at the same time. May change while a run is continued; what is trained counts."""


class StorageConfig(_Section):
    """Where and how the run is stored."""

    uri: Place = "./nf-runs"
    """A folder or s3://bucket/prefix; endpoint and credentials come from the environment."""
    dtype: Literal["float32", "float16", "bfloat16", "uint8"] = "float16"
    """Type of stored activations; `uint8` is 8 bits with a scale and a zero point per channel, measured per block."""
    codec: Literal["none", "zstd", "lz4"] = "none"
    """Parquet compression of the shards."""
    shard_bytes: ByteCount = 32 * 2**20
    """Tensor bytes per shard object."""
    cache: Literal["auto", "shards", "recompute"] = "auto"
    """Where a block's input comes from: `shards` stores every block's activations, `recompute` runs trained layers
    again on every batch, as far as they fit the budget, `auto` takes what measured rates say is faster. What starts
    from the images sees `train.augment` anew every epoch. Pipelined runs and plans without timings store shards."""
    keep_activations: Literal["all", "last", "none"] = "all"
    """`last` deletes a block's activations once all that read them are trained, but for the last ones of the run and
    those that a run which ended early would go on from; `none` deletes these as well when the final model is there.
    May change while a run is continued."""

    @field_validator("shard_bytes")
    @classmethod
    def _bound_shard(cls, value: int) -> int:
        if not 2**10 <= value <= 2**30:
            raise ValueError("want 1KiB to 1GiB")
        return value


class ClusterConfig(_Section):
    """Where stages run; not part of the fingerprint. Only `num_threads` can change the result, in its last bits."""

    executor: Literal["ray", "inline"] = "ray"
    """`inline` runs every stage in this process; `ray` as Ray tasks."""
    address: Place | None = None
    """Ray address to join; None starts a local Ray and stops it at the end."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of a training worker; None takes what the run began with, at first all of the driver's machine."""
    placement_timeout_s: float = Field(default=60.0, gt=0.0, le=31_536_000.0)
    """How long a task may wait for a worker that others of this run do not hold, before the run fails."""
    autoscaling: bool = False
    """Whether the cluster adds nodes when tasks wait; then nothing is refused because no node holds it yet. Name the
    device and the budget: what nodes will have cannot be read from a cluster that has none."""
    overlap: bool = True
    """Whether a block may start on its input's first shards while the block before still writes the rest."""


class RunConfig(_Section):
    """Everything that decides a run."""

    run: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run: letters, digits, '.', '_' and '-'."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    memory: MemoryConfig
    train: TrainConfig = TrainConfig()
    exits: ExitsConfig = ExitsConfig()
    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check_cache(self) -> "RunConfig":
        if self.train.mode == "pipelined" and self.storage.cache == "recompute":
            raise ValueError(
                "storage.cache recompute needs train.mode sequential: blocks of a pipelined run train on what others "
                "publish every round"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """Hash of every setting that can change the result (16 hex digits)."""
        excluded = {
            "run": True,
            "cluster": True,
            "storage": {"uri", "keep_activations"},
            "data": {"decode_threads"},
            "exits": {"patience"},
        }
        settings = self.model_dump(exclude=excluded)
        return fingerprint_of({"format_version": FORMAT_VERSION, **settings})


def fingerprint_of(document: Any) -> str:
    """Hashes a JSON document independently of key order (16 hex digits of SHA-256)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve_config(
    *, file: Path | None = None, assignments: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Merges file < `section.field=value` assignments < named flags into a validated config.

    Args:
        file: TOML with one table per section; JSON where its name ends in .json.
        assignments: as given to `--set`; values are read as TOML, then as plain text.
        flags: dotted field -> value; None values were not given.

    Raises:
        ConfigError: unreadable file, unknown field (with near names), or a value out of range.
    """
    merged: dict[str, Any] = _read_file(file) if file is not None else {}
    for assignment in assignments:
        field, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: no '='", "--set section.field=value")
        _assign(merged, field.strip(), _parse_value(text))
    for field, value in (flags or {}).items():
        if value is not None:
            _assign(merged, field, value)
    return validate_config(merged)


def validate_config(document: Mapping[str, Any]) -> RunConfig:
    """Checks a nested mapping against the schema.

    Raises:
        ConfigError: names every wrong field with got and want.
    """
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        raise _explain(error) from None


def images_config(**settings: Any) -> DataConfig:
    """Checks the section `data` alone, for images that a trained model reads.

    Raises:
        ConfigError: names every wrong field with got and want.
    """
    return validate_config({"memory": {"budget_bytes": 1}, "data": settings}).data  # the budget is for nobody


def field_names() -> list[str]:
    """Lists every setting as `section.field`, in the order of the classes."""
    names = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            names += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            names.append(name)
    return names


def _read_file(file: Path) -> dict[str, Any]:
    is_json = file.suffix.lower() == ".json"
    try:
        text = _read_text(file)
        document = json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, ValueError) as error:  # what the parsers raise is a ValueError, numbers of 5,000 digits too
        fix = f"give a readable {'JSON' if is_json else 'TOML'} file"
        raise ConfigError(f"config file {file}: {error}", fix) from None
    except RecursionError:
        raise ConfigError(f"config file {file}: it is nested too deeply", "one table per section") from None
    if not isinstance(document, dict):
        raise ConfigError(f"config file {file}: holds no sections", 'write {"section": {"field": value}}')
    return document


def _read_text(file: Path) -> str:
    # A pipe could keep the program waiting for ever, and a device may never end.
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("it is no regular file")
    with file.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return data.decode()


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _assign(document: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise ConfigError(f"{dotted}: {section} is no section", "--set section.field=value")
    document[last] = value


def _explain(error: ValidationError) -> ConfigError:
    known = field_names()
    lines, fixes = [], []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])[:_SHOWN_CHARS]
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown setting")
            fixes.append(did_you_mean(field, known, otherwise=f"known settings: {', '.join(known)}"))
        elif problem["type"] == "missing":
            lines.append(f"{field}: not given")
            fixes.append("--memory-budget 300MiB" if field.startswith("memory") else f"give {field}")
        else:
            lines.append(f"{field}: got {_shown(problem['input'])}, {problem['msg'].removeprefix('Value error, ')}")
            fixes.append(f"change {field}")
    return ConfigError("configuration: " + "; ".join(lines), "; ".join(dict.fromkeys(fixes)))


def _shown(value: Any) -> str:
    try:
        return redacted(repr(value))[:_SHOWN_CHARS]
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
        return f"{type(value).__name__} that is too large to show"
