"""Runs code that the user brought: whatever it raises becomes one error that says what, why and where.

A factory, a forward pass or a module's own copy can fail in any way, end the program with `sys.exit()` or ask for
more memory than there is. Knows nothing of models. Entries: `user_code`, and `HostLimit` for allocations.
"""

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nf_pipeline.core.collectives import PeerLost
from nf_pipeline.errors import ConfigError, NFError
from nf_pipeline.host import memory_bytes
from nf_pipeline.units import format_bytes

_REASON_CHARS = 300


@contextmanager
def user_code(what: str, fix: str) -> Iterator[None]:
    """Turns whatever the code inside raises into an error.

    Args:
        what: completes "WHAT: ValueError: text (file.py:12)".
        fix: one action.

    Raises:
        ConfigError: anything was raised, `SystemExit` included. Documented errors, a lost worker of the gang and
            Ctrl-C pass.
    """
    try:
        yield
    except (NFError, PeerLost, KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # the user's code can fail in any way, and sys.exit() must not end this program
        raise ConfigError(f"{what}: {describe(error)}", fix) from error


def describe(error: BaseException) -> str:
    """Returns an error's type, the first line of its text, and the file and line that raised it."""
    # Not str(error): the text is made by the user's class, which may fail at that too.
    text = str(traceback.TracebackException(type(error), error, None))
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    reason = text.strip().partition("\n")[0][:_REASON_CHARS]
    return f"{type(error).__name__}{f': {reason}' if reason else ''}{where}"


class HostLimit(TorchDispatchMode):
    """Refuses what would take more memory than this machine has, before it is allocated.

    Counts what factory functions (`empty`, `zeros`, `randn`, ...) ask for on the CPU while it is entered: weights are
    made by these. A huge layer would be filled, and the system would end the process, before anybody could say why.

    Args:
        limit_bytes: None takes the machine's memory.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        super().__init__()
        self._limit = memory_bytes() if limit_bytes is None else limit_bytes
        self._asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at one operator before it runs."""
        self._asked += _requested_bytes(func, args, kwargs or {})
        check_host_memory(self._asked, "it asks for", self._limit)
        return func(*args, **(kwargs or {}))


def check_host_memory(num_bytes: int, what: str, limit_bytes: int | None = None) -> None:
    """Refuses more bytes than this machine has.

    Raises:
        MemoryError: WHAT so many bytes, and how many there are.
    """
    limit = memory_bytes() if limit_bytes is None else limit_bytes
    if num_bytes > limit:
        raise MemoryError(f"{what} {format_bytes(num_bytes)}, this machine has {format_bytes(limit)}")


def _requested_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    if "size" not in names or names[0] == "self" or torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return 0
    position = names.index("size")
    size = args[position] if position < len(args) else kwargs.get("size", ())
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return math.prod(int(length) for length in size) * dtype.itemsize
