"""Runs in processes of their own, from a server that has loaded torch already."""

import faulthandler
import multiprocessing
import os
from collections.abc import Mapping, Sequence
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
    with context.Pool(len(names), maxtasksperchild=1) as pool:
        arguments = [(name, store, environment, changes) for name in names]
        return pool.starmap_async(_train, arguments, chunksize=1).get(timeout=300)


def _train(name: str, store: str, environment: Mapping[str, str], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    from nf_pipeline import train

    # A crash, or a run that hangs, is to say where: the pool would only wait for its result.
    faulthandler.enable()
    faulthandler.dump_traceback_later(_HANGS_AFTER_S)
    os.environ.update(environment)  # the server that this process comes from may be older than the store
    return train(make_config(store, run=name, **changes))
