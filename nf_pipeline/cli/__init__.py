"""The `nf-pipeline` command: parses, calls the driver, prints.

Importing it loads nothing; `nf-pipeline --help` loads click and nothing heavier. Entry: `main`.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None takes `sys.argv`.

    Returns:
        The exit code: 0 done, 2 bad configuration or data, 3 no plan fits the budget, 4 storage,
        5 a block failed for good, 70 a bug, 130 interrupted.
    """
    from nf_pipeline.cli.app import run_command_line

    return run_command_line(argv)
