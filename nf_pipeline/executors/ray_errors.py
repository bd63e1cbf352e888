"""What Ray raises, as the errors that the retry table knows. Entry: `translated`."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from nf_pipeline.errors import ConfigError, InternalError, NFError, WorkerLost


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turns what Ray raises inside the context into what happened.

    Args:
        name: of the stage, for the error.

    Raises:
        NFError: as the stage raised it.
        WorkerLost: the process or the node that ran it died, or does not answer.
        ConfigError: it cannot be placed.
        InternalError: anything else.
    """
    try:
        yield
    except RayTaskError as error:
        raise _cause_of(error) from None
    except OutOfMemoryError as error:
        raise WorkerLost(name, f"Ray ended it for host memory: {error}", "give the worker more memory") from None
    except (WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError, GetTimeoutError) as error:
        raise WorkerLost(name, type(error).__name__, "see the Ray logs of that worker") from None
    except TaskUnschedulableError as error:
        raise ConfigError(f"{name} cannot be placed: {error}", "add a node that holds it") from None
    except RayError as error:
        raise InternalError(f"{name}: {type(error).__name__}: {error}") from error


def _cause_of(error: RayTaskError) -> BaseException:
    cause = error.cause
    if isinstance(cause, NFError | MemoryError | OSError):
        return cause
    return InternalError(f"a worker raised {type(cause).__name__}: {cause}\n{error}")
