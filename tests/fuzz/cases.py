"""Counts what the fuzz tests tried, and says which outcomes are allowed.

Entries: `fuzz` makes a property test whose cases are counted, `documented` runs one case.
"""

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

from nf_pipeline.errors import InternalError, NFError

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
ALLOWED_EXIT_CODES = (0, 2, 3, 4, 5)

TRIED: Counter[str] = Counter()
FOUND: Counter[str] = Counter()


@functools.cache
def scratch_folder() -> Path:
    """Returns a folder of this session, for files that every case writes anew; the session's end removes it."""
    return Path(tempfile.mkdtemp(prefix="nf-fuzz-"))


def fuzz(target: str, *, quick: int, thorough: int, **strategies: SearchStrategy[Any]) -> Callable[..., Any]:
    """Makes a property test of a function, counted under the target's name.

    Args:
        target: row of the report.
        quick, thorough: cases of the two profiles; the quick one tries the same cases every time.
        strategies: arguments of the test.
    """

    def decorate(test: Callable[..., None]) -> Any:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            TRIED[target] += 1
            try:
                test(*args, **kwargs)
            except HypothesisException:
                raise
            except (Exception, SystemExit):
                FOUND[target] = 1  # hypothesis repeats a failing case while it makes it smaller
                raise

        profile = settings(
            max_examples=thorough if THOROUGH else quick,
            derandomize=not THOROUGH,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return profile(given(**strategies)(counted))

    return decorate


def tried(target: str) -> None:
    """Counts a case that is no property test's."""
    TRIED[target] += 1


def documented(call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or the documented error that it raises; anything else fails the test.

    Bad input is never reported as a bug of the program: `InternalError` fails the test too.
    """
    try:
        return call()
    except NFError as error:
        assert not isinstance(error, InternalError), error
        assert error.exit_code in ALLOWED_EXIT_CODES, error
        assert str(error)
        return error
