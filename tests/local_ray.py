"""A small Ray of the tests' own, for tests of Ray Data; entry: `running_ray`."""

import contextlib
import logging
from collections.abc import Iterator

NUM_CPUS = 2
OBJECT_STORE_BYTES = 100 * 2**20


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Starts a local Ray with two CPUs and stops it in the end; its workers see the environment as it is now."""
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
