"""Runs a function in several processes that are one another's gang, and brings their results back.

The processes come from a server that has loaded torch already: a gang starts in a tenth of a second.
"""

import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nf_pipeline.gang import Gang

_PRELOADED = ["torch", "nf_pipeline.worker.data_parallel", "nf_pipeline.core.profiler"]


class MemberFailed(Exception):
    """A member raised something; `cause` is what it was, None if the process died."""

    def __init__(self, rank: int, text: str, cause: Exception | None) -> None:
        super().__init__(rank, text, cause)
        self.rank = rank
        self.cause = cause

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.args[1]}"


def run_gang(work: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Calls `work(gang, *args)` in `size` processes and returns what they returned, by rank.

    Args:
        work: a function of a module that a fresh process can import.

    Raises:
        MemberFailed: the first by rank that raised or died.
    """
    outcomes = outcomes_of_gang(work, size, *args, timeout_s=timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, MemberFailed):
            raise outcome
    return outcomes


def outcomes_of_gang(work: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """The same with a `MemberFailed` in the place of each member that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    gangs = [Gang(rank=rank, size=size, address=f"127.0.0.1:{free_port()}") for rank in range(size)]
    gangs = [Gang(rank=gang.rank, size=size, address=gangs[0].address) for gang in gangs]
    members = []
    for gang in gangs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_be_member, args=(theirs, work, gang, args), daemon=True)
        process.start()
        theirs.close()
        members.append((process, ours))
    try:
        return [_outcome_of(rank, ours, timeout_s) for rank, (_, ours) in enumerate(members)]
    finally:
        for process, _ in members:
            process.kill()
            process.join()


def free_port() -> int:
    """Returns a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _be_member(results: Connection, work: Callable[..., Any], gang: Gang, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        outcome = work(gang, *args)
    except Exception as error:
        outcome = MemberFailed(gang.rank, traceback.format_exc(), error)
    # `send` would share tensors, whose memory ends with this process.
    results.send_bytes(pickle.dumps(outcome))


def _outcome_of(rank: int, results: Connection, timeout_s: float) -> Any:
    if not results.poll(timeout_s):
        return MemberFailed(rank, f"no result within {timeout_s:.0f} s", None)
    try:
        return pickle.loads(results.recv_bytes())
    except EOFError:
        return MemberFailed(rank, "the process died", None)
