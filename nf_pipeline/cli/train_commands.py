"""The commands that decide and train: plan, train, resume."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nf_pipeline.cli.interrupts import interruptible
from nf_pipeline.cli.options import (
    config_from,
    config_options,
    debug_option,
    factory_option,
    json_option,
    keep_option,
    quiet_option,
    run_argument,
    stop_option,
)

if TYPE_CHECKING:
    from nf_pipeline.driver.stop_request import StopRequest
    from nf_pipeline.events import Event

EXAMPLE = "nf-pipeline {} --data digits --model vgg11_bn --memory-budget 64MiB"


@click.command(
    "plan",
    short_help="Show blocks, batch sizes and predicted peaks.",
    epilog=f"Example: {EXAMPLE.format('plan')}",
)
@config_options
@json_option
@debug_option
def plan_command(*, as_json: bool, **given: Any) -> None:
    """Show what train would do: blocks, batch sizes, predicted peaks, shard bytes, placement.

    Reads the data set's labels and image size, profiles the model, stores nothing. With
    --address it counts the cluster's workers that could hold each block.
    """
    from nf_pipeline.cli.tables import plan_text

    config = config_from(given)  # a typo is reported before torch is loaded, which takes seconds
    from nf_pipeline.driver.preview import preview

    seen = preview(config)
    document = seen.plan.to_json() | {"placement": seen.placement}
    print(json.dumps(document) if as_json else plan_text(seen.plan, seen.placement))


@click.command(
    "train",
    short_help="Train block by block and keep the best small exit.",
    epilog=f"Example: {EXAMPLE.format('train')} --store ./nf-runs --run first",
)
@config_options
@json_option
@quiet_option
@debug_option
def train_command(*, as_json: bool, quiet: bool, **given: Any) -> None:
    """Train block by block and keep the smallest exit that is accurate enough.

    Everything goes to STORE/NAME (--store, --run). The same command again, or resume, continues a run
    that was stopped: finished stages are skipped.
    """
    from nf_pipeline.run_uri import join_run_uri

    config = config_from(given)
    run_uri = join_run_uri(config.storage.uri, config.run)
    from nf_pipeline.driver.run import train

    with _displayed(run_uri, config.model.name, quiet=quiet, patience=given["stop"]) as (progress, stop):
        summary = train(config, on_event=progress, stop=stop)
    _print_summary(summary, run_uri, as_json=as_json)


@click.command(
    "resume",
    short_help="Continue a run that was stopped.",
    epilog="Example: nf-pipeline resume ./nf-runs/first",
)
@run_argument
@click.option("--executor", type=click.Choice(["ray", "inline"]), help="Run it elsewhere than the run did.")
@click.option("--address", metavar="A", help="Ray cluster to join, such as auto or ray-head:6379.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="cluster.FIELD=VALUE",
    help="Change any setting of where it runs, such as cluster.placement_timeout_s=300; may be repeated.",
)
@click.option(
    "--repair", is_flag=True, help="Read every byte first; run exactly the stages again that made damaged objects."
)
@keep_option
@stop_option
@factory_option
@json_option
@quiet_option
@debug_option
def resume_command(
    uri: str,
    executor: str | None,
    address: str | None,
    assignments: tuple[str, ...],
    repair: bool,
    keep: str | None,
    stop: int | str | None,
    model: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a run that was stopped, with the configuration stored in it.

    Finished stages are verified and skipped; a half-trained block continues from its last epoch. Only where it
    runs, what it keeps, and when it ends can be changed: --executor, --address, --set cluster.FIELD=VALUE, --keep,
    --stop.
    """
    cluster = _cluster_changes(assignments, {"cluster.executor": executor, "cluster.address": address})
    from nf_pipeline.driver.run import resume

    changes = {"cluster": cluster, "keep": keep, "patience": stop, "model": model, "repair": repair}
    with _displayed(uri, model, quiet=quiet, is_repair=repair, patience=stop) as (progress, request):
        summary = resume(uri, on_event=progress, stop=request, **changes)
    _print_summary(summary, uri, as_json=as_json)


@contextmanager
def _displayed(
    run_uri: str, model: str | None, *, quiet: bool, is_repair: bool = False, patience: int | str | None = None
) -> Iterator[tuple[Callable[[Event], None], StopRequest]]:
    from nf_pipeline.cli.progress import open_progress
    from nf_pipeline.driver.status import read_plan
    from nf_pipeline.driver.stop_request import StopRequest

    stop = StopRequest()
    plan = None if is_repair else read_plan(run_uri)  # it may be what is to be repaired
    display = open_progress(sys.stderr, plan=plan, quiet=quiet)
    try:
        with interruptible(_continuing(run_uri, model, is_repair, patience), stop) as check:

            def listen(event: Event) -> None:
                check()
                display(event)

            yield listen, stop
    finally:
        display.close()


def _continuing(run_uri: str, model: str | None, is_repair: bool, patience: int | str | None = None) -> str:
    words = ["nf-pipeline", "resume", run_uri]
    if model is not None and ":" in model:  # a factory is imported only if it is named again
        words += ["--model", model]
    if patience is not None:  # a run that has begun does not record another one
        words += ["--stop", patience if isinstance(patience, str) else f"patience={patience}"]
    return shlex.join([*words, "--repair"] if is_repair else words)


def _cluster_changes(assignments: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    from nf_pipeline.config import resolve_config
    from nf_pipeline.errors import ConfigError

    for assignment in assignments:
        field = assignment.partition("=")[0].strip()
        if not field.startswith("cluster."):
            raise ConfigError(
                f"--set {assignment}: the settings of a run that has begun cannot change, only cluster.*",
                "start another run with train and another --run NAME",
            )
    # Nothing else of this configuration is used: a budget has to be in it, whichever.
    config = resolve_config(assignments=assignments, flags={"memory.budget_bytes": 1, **flags})
    return config.cluster.model_dump(exclude_unset=True)


def _print_summary(summary: dict[str, Any], run_uri: str, *, as_json: bool) -> None:
    from nf_pipeline.cli.tables import summary_text

    print(json.dumps(summary) if as_json else summary_text(summary, run_uri))
