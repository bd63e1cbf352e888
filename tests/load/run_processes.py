"""Runs in processes of their own, from a server that has loaded torch already."""

import faulthandler
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from load_config import make_config

_HANGS_AFTER_S = 240
_PRELOADED = ["nf_pipeline.worker.train_block", "nf_pipeline.worker.assemble", "nf_pipeline.core.planner"]


def train_at_once(names: Sequence[str], store: str, **changes: Any) -> list[Mapping[str, Any]]:
    """Trains runs of these names in one store at the same time and returns their summaries, in order.

    Args:
        names: of the runs.
        store: URI; the environment leads there.
        changes: as `make_config`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    # Unlike multiprocessing's own pool, this one says so when a process has died, of a crash or of its time-out.
    with ProcessPoolExecutor(len(names), mp_context=context) as pool:
        running = [pool.submit(_train, name, store, environment, changes) for name in names]
        return [run.result() for run in running]


def _train(name: str, store: str, environment: Mapping[str, str], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    from nf_pipeline import train

    # A crash, or a run that hangs, is to say where.
    faulthandler.enable()
    faulthandler.dump_traceback_later(_HANGS_AFTER_S, exit=True)
    os.environ.update(environment)  # the server that this process comes from may be older than the store
    summary = train(make_config(store, run=name, **changes))
    faulthandler.cancel_dump_traceback_later()
    return summary
