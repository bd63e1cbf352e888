"""Joins a Ray cluster, or starts a local one that only this run can use, with errors that say what to do.

Ray runs code for whoever reaches its ports. A cluster is as open as those who run it decided; the local one listens
on the loopback address and demands a token that exists only as long as it does. Entry: `connect`.
"""

import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import ConfigError

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # events only: the data goes through the run's store
CONNECT_TIMEOUT_S = 10.0

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)")

# "0" makes 127.0.0.1 the address of a node, and then all of its ports are bound to it. Ray reads it when a process
# imports it; outside Windows and macOS it is on.
_BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_AUTH_MODE, _AUTH_TOKEN, _AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def connect(cluster: ClusterConfig) -> ExitStack:
    """Joins the Ray at `cluster.address`; without one starts a Ray of this process's own.

    Returns:
        What leaves the cluster, or stops the own Ray, when it is closed.

    Raises:
        ConfigError: there is no Ray at the address, or it wants another token.
    """
    if cluster.address is not None:
        _check_address(cluster.address)
    with ExitStack() as connection, _keeping_sigterm():
        try:
            if cluster.address is None:
                _start_local(connection)
            else:
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
                connection.callback(ray.shutdown)
        except AuthenticationError as error:
            raise ConfigError(
                f"the Ray cluster at {cluster.address or 'this machine'} refuses: {str(error).splitlines()[0]}",
                "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
            ) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cannot reach a Ray cluster at {cluster.address or 'this machine'}: {error}",
                "check --address, or leave it out to start a local Ray, or use --executor inline",
            ) from error
        return connection.pop_all()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Puts a handler of SIGTERM back, which `ray.init` replaces by its own; where there was none, Ray's may stay."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_local(connection: ExitStack) -> None:
    connection.enter_context(_variables(_private_variables(os.environ)))
    with _on_loopback():
        # "local": a bare init joins whatever a file in the temporary folder points at.
        context = ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        )
    connection.callback(ray.shutdown)
    _spare_agents_last_words(Path(context.address_info["session_dir"]))


def _spare_agents_last_words(session: Path) -> None:
    """Makes two processes of Ray end within seconds when this one is killed, and not after a minute.

    Ray's agents notice at once that the node is gone, and then wait 60 s for its head, which is gone as well, to
    report that. They do not if the node's log says that it was asked to end:
    https://github.com/ray-project/ray/blob/ray-2.49.0/python/ray/_private/process_watcher.py
    """
    log = session / "logs" / "raylet.out"
    with suppress(OSError), log.open("a") as file:  # the wait is all that there is to lose
        file.write("nf_pipeline: if the driver is killed, what follows holds. Raylet received SIGTERM\n")


def _private_variables(given: Mapping[str, str]) -> dict[str, str]:
    """Returns what closes a local Ray to others, as far as the user has not decided otherwise."""
    own = {} if _BEYOND_LOOPBACK in given else {_BEYOND_LOOPBACK: "0"}
    if given.get(_AUTH_MODE, "token").lower() == "token":
        own[_AUTH_MODE] = "token"
        if not given.get(_AUTH_TOKEN) and not given.get(_AUTH_TOKEN_PATH):
            # Left to itself, Ray would write one into the home directory, for everybody to read and to stay there.
            own[_AUTH_TOKEN] = secrets.token_hex(32)
    return own


@contextmanager
def _variables(own: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment for Ray, in this process and all that it starts; puts back what was there."""
    before = {name: os.environ.get(name) for name in (*own, _AUTH_MODE)}
    os.environ.update(own)
    _read_authentication_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_authentication_again()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Applies `_BEYOND_LOOPBACK` to this process too, which may have imported Ray before it was set."""
    before = ray_constants.ENABLE_RAY_CLUSTER  # no promise either; tests/security looks at the ports
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[_BEYOND_LOOPBACK] != "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _read_authentication_again() -> None:
    """Ray reads mode and token once per process; this one may start or join another Ray later."""
    try:
        from ray._raylet import AuthenticationTokenLoader, Config
    except ImportError:  # they are no promise of Ray's; a process that starts one Ray does without
        return
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_address(address: str) -> None:
    """Ray itself tries an address that nobody answers for minutes; names such as "auto" are left to it."""
    if "@" in address:
        raise ConfigError("--address: credentials do not belong into it (not shown)", "set RAY_AUTH_TOKEN")
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}",
            "check --address, or leave it out to start a local Ray, or use --executor inline",
        ) from None
