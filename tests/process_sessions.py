"""Long-running commands for tests, each in a session of its own that is gone at the end, whatever happened.

Entry: `running`. A session, not only a process group: Ray puts its workers into groups of their own.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Session:
    """A command that runs.

    Attributes:
        process: its leader.
        log: what it and its children print.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """Returns what was printed until now."""
        return self.log.read_text(encoding="utf8", errors="replace")

    def wait_for_line(self, part: str) -> None:
        """Waits until something was printed.

        Raises:
            AssertionError: the command ended before, or it took too long.
        """
        wait_until(lambda: part in self.text() or self.process.poll() is not None, f"{part!r} in {self.log.name}")
        assert part in self.text(), f"ended with {self.process.poll()}: {self.text()[-3000:]}"


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: it took too long.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, stdin: int = subprocess.DEVNULL
) -> Iterator[Session]:
    """Runs a command beside the test; leaving the block ends it and all that it started."""
    setpriv = shutil.which("setpriv")
    if setpriv:  # Linux: it also ends when the test run is killed
        command = [setpriv, "--pdeathsig", "TERM", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=output, stdin=stdin, start_new_session=True
        )
    try:
        yield Session(process=process, log=log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks the leader, which ends its children in order; then kills whatever of its session is left."""
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
    for pid in members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


def members(session: int) -> list[int]:
    """Lists the processes of a session that are not mere entries waiting for their parent."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True, timeout=STOP_TIMEOUT_S
    ).stdout
    return [int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")]


def free_ports(number: int) -> list[int]:
    """Returns ports of the loopback address that nobody listens on."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [listener.getsockname()[1] for listener in listeners]
