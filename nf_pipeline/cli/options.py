"""Options that several commands share, and the table of named flags that set a configuration field.

Knows the names of configuration fields, not their types or ranges: the configuration checks those. Loads
nothing heavier than click. Entry: `config_options` decorates a command, `config_from` reads what it got.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nf_pipeline.redact import redacted

if TYPE_CHECKING:
    from nf_pipeline.config import RunConfig


@dataclass
class Session:
    """What holds for one run of the command line.

    Attributes:
        debug: print tracebacks and the log.
    """

    debug: bool = False


class KeepPolicy(click.ParamType):
    """What a run keeps of one kind of its objects, typed as "activations=last"; only the policy is handed on."""

    name = "keep"
    policies = ("all", "last", "none")

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the policy."""
        kind, _, policy = value.partition("=")
        if kind != "activations" or policy not in self.policies:
            wanted = " or ".join(f"activations={policy}" for policy in self.policies)
            self.fail(f"got {value!r}, want {wanted}", param, ctx)
        return policy


class StopPolicy(click.ParamType):
    """When a run ends before all blocks are trained, typed as "patience=2" or "never"."""

    name = "stop"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """Returns the number of blocks, or "never"."""
        if value == "never" or isinstance(value, int):
            return value
        kind, _, patience = value.partition("=")
        if kind != "patience" or not patience.isdecimal() or int(patience) < 1:
            self.fail(f"got {value!r}, want patience=N with N of 1 or more, or never", param, ctx)
        return int(patience)


@dataclass(frozen=True, kw_only=True)
class ConfigFlag:
    """A named flag for one configuration field.

    Attributes:
        name: as typed, "--epochs".
        field: dotted field that it sets, "train.epochs".
        explanation: for --help, without the default.
        default: the field's default as text; "" if it has none worth showing.
        value_type: of click; only what the field also accepts.
        metavar: placeholder in --help.
    """

    name: str
    field: str
    explanation: str
    default: str = ""
    value_type: Any = str
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """Name under which click passes the value."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def help(self) -> str:
        """Text of --help, with the default."""
        return f"{self.explanation}  [default: {self.default}]" if self.default else self.explanation


KEEP_METAVAR = "activations=" + "|".join(KeepPolicy.policies)
STOP_METAVAR = "patience=N|never"

CONFIG_FLAGS = (
    ConfigFlag(
        name="--data",
        field="data.source",
        metavar="D",
        default="digits",
        explanation="Directory or URI of Parquet, image folder with one directory per class, torchvision "
        "data set name, or 'digits'.",
    ),
    ConfigFlag(
        name="--model",
        field="model.name",
        metavar="M",
        default="one that suits the images",
        explanation="convnet, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn, resnet18, resnet34, resnet50, "
        "mobilenet_v2; any other as torchvision:NAME or timm:NAME; or your own as package.module:factory.",
    ),
    ConfigFlag(
        name="--memory-budget",
        field="memory.budget_bytes",
        metavar="SIZE",
        explanation="Bytes that training may hold on a worker's device, such as 300MiB or 6GiB; auto reads it from "
        "the cluster. Required, here or in the --config file: batch sizes and blocks follow from it.",
    ),
    ConfigFlag(
        name="--store",
        field="storage.uri",
        metavar="URI",
        default="./nf-runs",
        explanation="Folder or s3://bucket/prefix that holds runs; S3 credentials and endpoint come from the "
        "AWS_* environment variables.",
    ),
    ConfigFlag(name="--run", field="run", metavar="NAME", default="run", explanation="Name of the run in the store."),
    ConfigFlag(
        name="--executor",
        field="cluster.executor",
        default="ray",
        value_type=click.Choice(["ray", "inline"]),
        explanation="Run stages as Ray tasks, or in this process.",
    ),
    ConfigFlag(
        name="--address",
        field="cluster.address",
        metavar="A",
        default="start a local Ray and stop it at the end",
        explanation="Ray cluster to join, such as auto or ray-head:6379.",
    ),
    ConfigFlag(
        name="--image-size",
        field="data.image_size",
        metavar="PX",
        value_type=int,
        explanation="Resize every image to PX by PX pixels; needed when sizes differ.",
    ),
    ConfigFlag(
        name="--max-train-images",
        field="data.max_train_images",
        metavar="N",
        value_type=int,
        default="all",
        explanation="Train on a stratified, seeded subset.",
    ),
    ConfigFlag(
        name="--on-bad-image",
        field="data.on_bad_image",
        default="error",
        value_type=click.Choice(["error", "skip"]),
        explanation="End with an error, or count and list samples that cannot be read.",
    ),
    ConfigFlag(
        name="--epochs",
        field="train.epochs",
        metavar="N",
        value_type=int,
        default="8",
        explanation="Passes over the train split, per block.",
    ),
    ConfigFlag(
        name="--views",
        field="train.views",
        metavar="V",
        value_type=int,
        default="1",
        explanation="Store V differently augmented passes of the train split per block; the epochs of the next block "
        "read them in turn. Needs train.augment.",
    ),
    ConfigFlag(
        name="--local",
        field="train.local",
        default="auto",
        value_type=click.Choice(["auto", "layer", "block"]),
        explanation="A head and a loss of its own for every layer, or blocks of as many layers as memory allows, up "
        "to plain backpropagation; auto takes the fastest.",
    ),
    ConfigFlag(
        name="--mode",
        field="train.mode",
        default="sequential",
        value_type=click.Choice(["sequential", "pipelined"]),
        explanation="One block after the other, or all at the same time in rounds, on several workers.",
    ),
    ConfigFlag(
        name="--workers-per-block",
        field="train.workers_per_block",
        metavar="N",
        value_type=int,
        default="1",
        explanation="Workers that share the batches of a block.",
    ),
    ConfigFlag(
        name="--seed",
        field="train.seed",
        metavar="N",
        value_type=int,
        default="0",
        explanation="Same seed, same weights, whichever executor.",
    ),
    ConfigFlag(
        name="--device",
        field="train.device",
        default="auto",
        value_type=click.Choice(["auto", "cpu", "cuda"]),
        explanation="Train on this device; auto takes a GPU when there is one.",
    ),
    ConfigFlag(
        name="--stop",
        field="exits.patience",
        metavar=STOP_METAVAR,
        value_type=StopPolicy(),
        default="patience=2",
        explanation="End when N blocks in a row brought no exit above the validation noise, or train all blocks; "
        "a pipelined run always does.",
    ),
    ConfigFlag(
        name="--exits",
        field="exits.keep",
        default="chosen",
        value_type=click.Choice(["chosen", "all"]),
        explanation="Keep the chosen exit alone, or those before it too, for samples to leave at the first one that "
        "is sure enough.",
    ),
    ConfigFlag(
        name="--cache",
        field="storage.cache",
        default="auto",
        value_type=click.Choice(["auto", "shards", "recompute"]),
        explanation="Store every block's activations as shards, compute them again for every batch, or do what is "
        "faster by the rates that are measured when the run begins.",
    ),
    ConfigFlag(
        name="--keep",
        field="storage.keep_activations",
        metavar=KEEP_METAVAR,
        value_type=KeepPolicy(),
        default="all",
        explanation="Which blocks' stored activations stay: all, the last ones, or, once the model is finished, "
        "none; what a block still has to read always stays.",
    ),
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds every named configuration flag, --config and --set to a command."""
    decorators: list[Decorator] = [
        click.option(
            flag.name,
            flag.parameter,
            type=flag.value_type,
            metavar=flag.metavar,
            default=None,
            help=flag.help,
        )
        for flag in CONFIG_FLAGS
    ]
    decorators.append(
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TOML file with one table per section, or JSON if its name ends in .json; --set and the flags above "
            "override it.",
        )
    )
    decorators.append(
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.FIELD=VALUE",
            help="Set any other setting, such as train.head=classic; may be repeated.",
        )
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def config_from(parameters: Mapping[str, Any]) -> RunConfig:
    """Turns what click parsed for `config_options` into a configuration.

    Raises:
        ConfigError: as `resolve_config` does.
    """
    from nf_pipeline.config import resolve_config

    return resolve_config(
        file=parameters["config_file"],
        assignments=parameters["assignments"],
        flags={flag.field: parameters[flag.parameter] for flag in CONFIG_FLAGS},
    )


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, and the traceback if there is one, without credentials."""
        return redacted(super().format(record))


def _switch_debug_on(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(context.obj, Session):
        context.obj.debug = True
        shown = logging.StreamHandler()
        shown.setFormatter(_WithoutSecrets("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(handlers=[shown])
        logging.getLogger("nf_pipeline").setLevel(logging.DEBUG)


run_argument = click.argument("uri", metavar="STORE/NAME")
factory_option = click.option(
    "--model",
    metavar="package.module:factory",
    help="The run's own model factory: code, so it must be named again. Registry models need nothing.",
)
keep_option = click.option(
    "--keep",
    type=KeepPolicy(),
    metavar=KEEP_METAVAR,
    help="Which blocks' stored activations stay, in place of what the run was started with.",
)
stop_option = click.option(
    "--stop",
    type=StopPolicy(),
    metavar=STOP_METAVAR,
    help="When to end before all blocks are trained, in place of what the run was started with; never goes on with a "
    "run that ended early.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout; progress goes to stderr."
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress; only warnings, the result and errors.")
debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_switch_debug_on,
    help="Print the log, and the traceback of an error.",
)
