"""The command group, and what becomes of errors: a text on stderr and an exit code.

Entry: `run_command_line`.
"""

import sys
import traceback
from collections.abc import Sequence

import click

from nf_pipeline.cli.bench_command import bench_cell_command, bench_command
from nf_pipeline.cli.cluster_commands import submit_command, worker_resources_command
from nf_pipeline.cli.model_commands import evaluate_command, export_command, predict_command
from nf_pipeline.cli.options import Session, debug_option
from nf_pipeline.cli.store_commands import doctor_command, gc_command, status_command, verify_command
from nf_pipeline.cli.train_commands import plan_command, resume_command, train_command
from nf_pipeline.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, InternalError, NFError
from nf_pipeline.redact import redacted

PROGRAM = "nf-pipeline"


class _InWorkflowOrder(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        """Lists commands in the order in which they are added, not of the alphabet."""
        return list(self.commands)


@click.group(cls=_InWorkflowOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="nf_pipeline")
@debug_option
def command_line() -> None:
    """Train CNNs that do not fit a small GPU: block by block, under a memory budget.

    You say how much device memory a worker has; layers are grouped into blocks that fit, blocks are trained
    one after another from stored activations, and the smallest early exit that is accurate enough becomes
    the final model.

    \b
    First steps, on the digits that ship with the package:
      nf-pipeline doctor                          is this machine ready?
      nf-pipeline plan  --memory-budget 64MiB     what would happen
      nf-pipeline train --memory-budget 64MiB     do it
      nf-pipeline status ./nf-runs/run            how far is it?

    \b
    Exit codes: 0 done, 2 bad configuration or data, 3 no plan fits the budget, 4 storage,
    5 a block failed for good, 70 a bug, 130 interrupted.
    """


for command in (
    plan_command,
    train_command,
    resume_command,
    submit_command,
    worker_resources_command,
    status_command,
    evaluate_command,
    predict_command,
    export_command,
    doctor_command,
    verify_command,
    gc_command,
    bench_command,
    bench_cell_command,
):
    command_line.add_command(command)


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see `nf_pipeline.cli.main`."""
    session = Session()
    arguments = None if argv is None else list(argv)
    try:
        returned = command_line.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=session)
        return returned if isinstance(returned, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # the process ends here: every error must become a text and a code
        return _report(error, session)


def _report(error: Exception, session: Session) -> int:
    if session.debug:
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)
    exit_code = error.exit_code if isinstance(error, NFError) else EXIT_INTERNAL
    if isinstance(error, NFError) and not isinstance(error, InternalError):
        print(f"Error: {redacted(str(error))}", file=sys.stderr)
        return exit_code
    print(f"Internal error: {type(error).__name__}: {redacted(str(error))}", file=sys.stderr)
    if not session.debug:
        print("Fix: run the command again with --debug and report the traceback", file=sys.stderr)
    return exit_code
