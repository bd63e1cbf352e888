"""Joins a Ray cluster, or starts a local one, with errors that say what to do. Entry: `connect`."""

import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import ConfigError

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # events only: the data goes through the run's store
CONNECT_TIMEOUT_S = 10.0

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)")


def connect(cluster: ClusterConfig) -> None:
    """Joins the Ray at `cluster.address`; without one starts a Ray of this process's own.

    Raises:
        ConfigError: there is no Ray at the address.
    """
    if cluster.address is not None:
        _check_reachable(cluster.address)
    try:
        with _keeping_sigterm():
            _init(cluster)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot reach a Ray cluster at {cluster.address or 'this machine'}: {error}",
            "check --address, or leave it out to start a local Ray, or use --executor inline",
        ) from error


def _init(cluster: ClusterConfig) -> None:
    if cluster.address is None:
        # "local": a bare init joins whatever a file in the temporary folder points at. Token
        # authentication is left as the environment says; Ray reads RAY_AUTH_MODE when it is imported
        # and since 2.59 turns it on for local clusters by itself.
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        )
    else:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Puts a handler of SIGTERM back, which `ray.init` replaces by its own; where there was none, Ray's may stay."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_reachable(address: str) -> None:
    """Ray itself tries an address that nobody answers for minutes; names such as "auto" are left to it."""
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
