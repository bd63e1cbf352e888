"""The commands that look after runs and the place they live in: status, doctor, verify, gc."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nf_pipeline.cli.options import debug_option, json_option, keep_option, run_argument
from nf_pipeline.errors import EXIT_DONE, EXIT_STORAGE

if TYPE_CHECKING:
    from nf_pipeline.driver.garbage import Garbage


@click.command(
    "status",
    short_help="Print which stages are done, running or failed.",
    epilog="Example: nf-pipeline status ./nf-runs/run",
)
@run_argument
@json_option
@debug_option
def status_command(uri: str, as_json: bool) -> None:
    """Print which stages of a run are done, running or failed, from the store alone."""
    from nf_pipeline.cli.tables import status_text
    from nf_pipeline.driver.status import read_status

    status = read_status(uri)
    print(json.dumps(status) if as_json else status_text(status))


@click.command(
    "doctor",
    short_help="Check torch, GPU, Ray and the store.",
    epilog="Example: nf-pipeline doctor --store s3://bucket/prefix",
)
@click.option("--store", default="./nf-runs", show_default=True, metavar="URI", help="Store to write a probe to.")
@click.option("--ray", "start_ray", is_flag=True, help="Also start a local Ray and run one task on it.")
@json_option
@debug_option
@click.pass_context
def doctor_command(context: click.Context, store: str, start_ray: bool, as_json: bool) -> None:
    """Check torch, GPU, Ray and the store, and say what to fix.

    Exit code: 0 if nothing failed, 4 if the store cannot be used, 2 for anything else.
    """
    from nf_pipeline.cli.tables import checks_text
    from nf_pipeline.driver.doctor import exit_code_of, run_checks

    checks = run_checks(store, start_ray=start_ray)
    print(json.dumps([dataclasses.asdict(check) for check in checks]) if as_json else checks_text(checks))
    context.exit(exit_code_of(checks))


@click.command(
    "verify",
    short_help="Read every byte of a run, name what is damaged.",
    epilog="Example: nf-pipeline verify s3://bucket/prefix/run",
)
@run_argument
@json_option
@debug_option
@click.pass_context
def verify_command(context: click.Context, uri: str, as_json: bool) -> None:
    """Check a whole run: its documents, whether they belong together, and every byte of what they name.

    Changes nothing; resume --repair mends what it finds. Unfinished stages are no damage. The event log is not
    checked.

    Exit code: 0 if nothing is damaged, 4 otherwise.
    """
    from nf_pipeline.cli.tables import verify_text
    from nf_pipeline.driver.verify import verify_run

    report = verify_run(uri)
    document = {**dataclasses.asdict(report), "is_whole": report.is_whole}
    print(json.dumps(document) if as_json else verify_text(document))
    context.exit(EXIT_DONE if report.is_whole else EXIT_STORAGE)


@click.command(
    "gc",
    short_help="Delete what no stage needs any more.",
    epilog="Example: nf-pipeline gc ./nf-runs/run --dry-run",
)
@run_argument
@click.option("--dry-run", is_flag=True, help="Only list what would be deleted.")
@keep_option
@json_option
@debug_option
def gc_command(uri: str, dry_run: bool, keep: str | None, as_json: bool) -> None:
    """Delete what failed or finished attempts left behind and no manifest names.

    What a resumed run goes on from stays. While a driver works on the run, everything of unfinished stages stays.
    --keep also gives up activations that have been read, of a run that nobody works on.
    """
    from nf_pipeline.cli.tables import garbage_text
    from nf_pipeline.driver.gc import collect_garbage

    garbage = collect_garbage(uri, dry_run=dry_run, keep=keep)
    document = _garbage_document(garbage, dry_run=dry_run)
    print(json.dumps(document) if as_json else garbage_text(garbage, dry_run=dry_run))


def _garbage_document(garbage: Sequence[Garbage], *, dry_run: bool) -> dict[str, Any]:
    from nf_pipeline.driver.garbage import by_kind

    return {
        "deleted": not dry_run,
        "num_bytes": sum(item.num_bytes for item in garbage),
        "kinds": {kind: {"count": count, "num_bytes": size} for kind, count, size in by_kind(garbage)},
        "objects": [dataclasses.asdict(item) for item in garbage],
    }
