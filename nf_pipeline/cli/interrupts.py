"""Ctrl-C during a run: it always ends the command, and the user learns how to continue."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click


class Interrupted(click.ClickException):
    """The user pressed Ctrl-C; what is stored is enough to continue.

    Args:
        run_uri: STORE/NAME of the run.
    """

    exit_code = 130

    def __init__(self, run_uri: str) -> None:
        super().__init__(f"interrupted; continue with: nf-pipeline resume {run_uri}")

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the text without click's "Error:"; nothing went wrong."""
        print(self.message, file=file or sys.stderr)


@contextmanager
def interruptible(run_uri: str) -> Iterator[Callable[[], None]]:
    """Turns Ctrl-C into `Interrupted`.

    Python drops an exception that strikes in a weak reference's callback or a finaliser, and counting live
    bytes while a block trains runs thousands of those: a Ctrl-C can get lost there. So it is noted as well.

    Args:
        run_uri: STORE/NAME of the run.

    Yields:
        A function to call now and then, which raises KeyboardInterrupt if one was noted.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    noted: list[int] = []

    def note(signal_number: int, _frame: object) -> None:
        noted.append(signal_number)
        raise KeyboardInterrupt

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a job in the background may ignore Ctrl-C on purpose
        signal.signal(signal.SIGINT, note)
    try:
        yield check
    except KeyboardInterrupt:
        raise Interrupted(run_uri) from None
    finally:
        signal.signal(signal.SIGINT, before)
