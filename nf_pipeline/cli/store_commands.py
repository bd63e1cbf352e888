"""The commands that look after runs and the place they live in: status, doctor, gc."""

import dataclasses
import json

import click

from nf_pipeline.cli.options import debug_option, json_option, run_argument


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
    "gc",
    short_help="Delete what no stage needs any more.",
    epilog="Example: nf-pipeline gc ./nf-runs/run --dry-run",
)
@run_argument
@click.option("--dry-run", is_flag=True, help="Only list what would be deleted.")
@debug_option
def gc_command(uri: str, dry_run: bool) -> None:
    """Delete what failed or finished attempts left behind and no manifest names.

    Everything of a stage that is not finished stays, so that it can be resumed; half-written files go once the
    run is done.
    """
    from nf_pipeline.cli.tables import garbage_text
    from nf_pipeline.driver.gc import collect_garbage

    print(garbage_text(collect_garbage(uri, dry_run=dry_run), dry_run=dry_run))
