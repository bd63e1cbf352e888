"""The commands that use a trained model: evaluate, predict, export."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nf_pipeline.cli.options import debug_option, factory_option, json_option, run_argument

if TYPE_CHECKING:
    from nf_pipeline.driver.early_exit_wish import EarlyExitWish

image_column_option = click.option(
    "--image-column", metavar="NAME", help="Parquet column with the image.  [default: found by its type]"
)
bad_image_option = click.option(
    "--on-bad-image",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="End with an error, or leave out samples that cannot be read.",
)


Command = TypeVar("Command", bound=Callable[..., Any])


def adaptive_options(command: Command) -> Command:
    """Adds the options with which samples leave at early exits."""
    options = [
        click.option(
            "--adaptive",
            is_flag=True,
            help="Let samples leave at the first exit that is sure enough, where that costs no accuracy on "
            "validation; for runs trained with --exits all.",
        ),
        click.option(
            "--accuracy",
            type=click.FloatRange(0, 1),
            metavar="A",
            help="The same at the lowest cost with this accuracy on validation, such as 0.75.",
        ),
        click.option(
            "--flops",
            type=click.FloatRange(0),
            metavar="F",
            help="The same at the highest accuracy with this cost of one sample on average.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    "evaluate",
    short_help="Measure every exit on labelled data.",
    epilog="Example: nf-pipeline evaluate ./nf-runs/run --data ./new-images",
)
@run_argument
@click.option("--data", required=True, metavar="D", help="Labelled data, in any form that train reads.")
@click.option(
    "--image-size", type=click.IntRange(1, 4096), metavar="PX", help="Resize every image to PX by PX pixels."
)
@image_column_option
@click.option(
    "--label-column", metavar="NAME", help="Parquet column with the label.  [default: label, labels, target or class]"
)
@adaptive_options
@bad_image_option
@factory_option
@json_option
@debug_option
def evaluate_command(uri: str, data: str, model: str | None, as_json: bool, **settings: Any) -> None:
    """Print the accuracy, or error, of every exit of a finished run on labelled data."""
    from nf_pipeline.cli.tables import adaptive_text, evaluation_text
    from nf_pipeline.config import images_config
    from nf_pipeline.driver.evaluation import evaluate, evaluate_adaptive

    wish = _take_wish(settings)
    labelled = images_config(source=data, **settings)
    if wish is None:
        found, text = evaluate(uri, labelled, model), evaluation_text
    else:
        found, text = evaluate_adaptive(uri, labelled, wish, model), adaptive_text
    print(json.dumps(found) if as_json else text(found))


@click.command(
    "predict",
    short_help="Predict labels or values with the final model.",
    epilog="Example: nf-pipeline predict ./nf-runs/run ./images --output out.parquet",
)
@run_argument
@click.argument("images", metavar="INPUT")
@click.option("--output", required=True, metavar="OUT.parquet", help="File to write.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 65536),
    default=256,
    show_default=True,
    metavar="N",
    help="Images per step; any number gives the same predictions.",
)
@adaptive_options
@image_column_option
@bad_image_option
@factory_option
@json_option
@debug_option
def predict_command(
    uri: str, images: str, output: str, batch_size: int, model: str | None, as_json: bool, **settings: Any
) -> None:
    """Predict labels or values with the final model of a run.

    INPUT is Parquet or images, a file or a folder. The output has one row per sample: id, predicted label, class name
    and probability, or predicted values, and layer of the exit.
    """
    from nf_pipeline.cli.tables import prediction_text
    from nf_pipeline.driver.use import predict

    early_exits = _take_wish(settings)
    written = predict(uri, images, output, batch_size, model, early_exits=early_exits, **settings)
    print(json.dumps(written) if as_json else prediction_text(written))


def _take_wish(settings: dict[str, Any]) -> "EarlyExitWish | None":
    """Takes the options of `adaptive_options` out of a command's; None where none was given."""
    from nf_pipeline.driver.early_exit_wish import EarlyExitWish

    wishes = {name: settings.pop(name) for name in ("accuracy", "flops")}
    is_adaptive = settings.pop("adaptive") or any(wish is not None for wish in wishes.values())
    return EarlyExitWish(**wishes) if is_adaptive else None


@click.command(
    "export",
    short_help="Write the final model to a file.",
    epilog="Example: nf-pipeline export ./nf-runs/run --output model.pt2 --format torch-export",
)
@run_argument
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["safetensors", "torch-export"]),
    default="safetensors",
    show_default=True,
    help="Weights with their JSON description, or a program that torch.export.load runs.",
)
@click.option("--output", required=True, metavar="PATH", help="Where to write.")
@factory_option
@debug_option
def export_command(uri: str, format_name: str, output: str, model: str | None) -> None:
    """Write the final model of a run to a file."""
    from nf_pipeline.driver.use import export

    print(export(uri, format_name, output, model))
