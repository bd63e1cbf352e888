"""Runs services of docker-compose.yml as processes: their own commands, environments and health checks.

A container has its network and its files for itself; here all services share those of one machine. So names of
services become 127.0.0.1, ports become free ones, and every Ray node gets a temporary folder of its own. Nothing
else of a command is changed. Entry: `ComposeProcesses`.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose_file import read_services
from process_sessions import Session, free_ports, running

HEALTH_TIMEOUT_S = 90.0
SHARED_PORTS = (6379, 8265)  # of the head; everybody must mean the same
OWN_PORTS = (8080, 52365)  # of every node


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One container's counterpart.

    Attributes:
        service: its name.
        folder: its own.
        session: what runs.
        rename: port in the file -> port on this machine.
    """

    service: str
    folder: Path
    session: Session
    rename: Mapping[int, int]

    @property
    def exit_code(self) -> int | None:
        """Of the command; None while it runs."""
        return self.session.process.poll()


class ComposeProcesses:
    """Services as processes; a context manager that ends all of them."""

    def __init__(self, variables: Mapping[str, str], folder: Path) -> None:
        """Reads the file.

        Args:
            variables: what .env would hold.
            folder: for homes, logs and Ray's files; its path must be short, since it holds sockets.
        """
        self._services = read_services(variables)
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._shared = dict(zip(SHARED_PORTS, free_ports(len(SHARED_PORTS)), strict=True))
        self._num_started = 0

    def __enter__(self) -> "ComposeProcesses":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def start(self, service: str) -> Replica:
        """Starts one replica of a service."""
        self._num_started += 1
        name = f"{self._num_started}-{service}"
        folder = self._folder / name
        folder.mkdir()
        rename = self._shared | dict(zip(OWN_PORTS, free_ports(len(OWN_PORTS)), strict=True))
        session = self._stack.enter_context(
            running(
                self._command(service, folder, rename),
                self.environment(service, folder, rename),
                self._folder / f"{name}.log",
            )
        )
        return Replica(service=service, folder=folder, session=session, rename=rename)

    def environment(self, service: str, folder: Path, rename: Mapping[int, int]) -> dict[str, str]:
        """Returns what the container would see; of this machine's environment only where programs are."""
        own = {name: _on_this_machine(str(value), rename) for name, value in self._given(service).items()}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"} | own

    def wait_until_healthy(self, replica: Replica) -> None:
        """Runs the service's health check until it passes, as Docker does.

        Raises:
            AssertionError: it ended, or stays unhealthy.
        """
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        while not self.is_healthy(replica):
            assert replica.exit_code is None, replica.session.text()[-3000:]
            assert time.monotonic() < deadline, f"{replica.service} is unhealthy: {replica.session.text()[-3000:]}"
            time.sleep(0.5)

    def is_healthy(self, replica: Replica, changes: Mapping[str, str] | None = None) -> bool:
        """Runs the service's health check once.

        Args:
            replica: in whose environment.
            changes: to that environment.
        """
        check = self._services[replica.service]["healthcheck"]
        kind, *words = check["test"]
        assert kind == "CMD"
        command = [_on_this_machine(word, replica.rename) for word in words]
        environment = self.environment(replica.service, replica.folder, replica.rename) | dict(changes or {})
        timeout_s = float(check["timeout"].removesuffix("s"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout_s)
            return done.returncode == 0
        return False

    def _given(self, service: str) -> dict[str, Any]:
        return self._services[service].get("environment", {})

    def _command(self, service: str, folder: Path, rename: Mapping[int, int]) -> list[str]:
        definition = self._services[service]
        (client_port,) = free_ports(1)
        own = [f"--temp-dir={folder / 'ray'}", "--min-worker-port=0", "--max-worker-port=0"]
        own += [f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={rename[52365]}"]
        words = [_on_this_machine(word, rename) for word in [*definition["entrypoint"], *definition["command"]]]
        if words[:2] == ["ray", "start"]:
            return [*words[:2], *own, *words[2:]]
        return [re.sub(r"\bray start\b", f"ray start {' '.join(own)}", word) for word in words]


@contextlib.contextmanager
def all_running(replicas: list[Replica]) -> Iterator[None]:
    """Checks on leaving that none of them has ended meanwhile."""
    yield
    assert [replica.service for replica in replicas if replica.exit_code is not None] == []


def _on_this_machine(text: str, rename: Mapping[int, int]) -> str:
    text = re.sub(r"\b(ray-head|object-store)(?=:\d)", "127.0.0.1", text)
    return re.sub(r"(?<=[:=])(\d+)\b", lambda match: str(rename.get(int(match[1]), match[1])), text)
