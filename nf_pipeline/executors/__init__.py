"""Where stages run: in this process, or as tasks of a Ray cluster.

A stage is a generator function of one picklable description; it yields events and ends with `StageDone`.
Both executors hand out the same events in the same order.
"""

from nf_pipeline.config import ClusterConfig
from nf_pipeline.executors.base import Executor
from nf_pipeline.executors.inline import InlineExecutor


def open_executor(cluster: ClusterConfig, run: str | None = None) -> Executor:
    """Returns the executor that the configuration names, ready to run stages.

    Args:
        cluster: what it is and where.
        run: name under which the executor's monitoring shows what it is told of; None shows nothing.
    """
    if cluster.executor == "inline":
        return InlineExecutor()
    from nf_pipeline.executors.ray_cluster import RayExecutor

    return RayExecutor(cluster, run)
