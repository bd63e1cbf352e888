"""Ctrl-C during a run: the user learns what happens, and how to continue.

The first one lets the run finish the epochs that it is training, the second one ends it at once. SIGTERM and SIGHUP
(a job that is stopped, a terminal that is closed) end it at once, in order: tasks are cancelled, the run is given up
for the next driver. Entry: `interruptible`.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import EXIT_INTERRUPTED, RunInterrupted

_FINISHING = b"\nstopping when the epochs that are being trained are finished; Ctrl-C again stops at once\n"
_SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Interrupted(click.ClickException):
    """The user ended the run; what is stored is enough to continue.

    Args:
        command: that continues it.
    """

    exit_code = EXIT_INTERRUPTED

    def __init__(self, command: str) -> None:
        super().__init__(f"interrupted; continue with: {command}")

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the text without click's "Error:"; nothing went wrong."""
        print(self.message, file=file or sys.stderr)


@contextmanager
def interruptible(command: str, stop: StopRequest) -> Iterator[Callable[[], None]]:
    """Turns the signals that ask a run to end into `Interrupted`.

    Python drops an exception that strikes in a weak reference's callback or a finaliser, and counting live
    bytes while a block trains runs thousands of those: a Ctrl-C can get lost there. So it is noted as well.

    Args:
        command: that continues the run.
        stop: asked by the first Ctrl-C.

    Yields:
        A function to call now and then, which raises KeyboardInterrupt if the run is to end at once.

    Raises:
        Interrupted: the run ended because of a signal.
    """
    noted: list[int] = []

    def note(signal_number: int, _frame: object) -> None:
        if signal_number == signal.SIGINT and not stop.is_asked:
            stop.ask()
            os.write(2, _FINISHING)  # a signal may strike inside a print
            return
        noted.append(signal_number)
        raise KeyboardInterrupt

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is _SIGNALS[number]:  # a job in the background may ignore them on purpose
            signal.signal(number, note)
    try:
        yield check
    except (KeyboardInterrupt, RunInterrupted):
        raise Interrupted(command) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
