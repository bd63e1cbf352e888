"""Where a run lives: `STORE/NAME` on the command line, a store's URI and a run's name inside.

Knows only text: whether the store or the run exists is somebody else's question. Entry: `split_run_uri`.
"""

import re

from nf_pipeline.errors import ConfigError
from nf_pipeline.redact import redacted

DEFAULT_STORE_URI = "./nf-runs"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FIX = "give STORE/NAME, such as ./nf-runs/run or s3://bucket/prefix/run"


def split_run_uri(uri: str) -> tuple[str, str]:
    """Splits `STORE/NAME` into the store's URI and the run's name.

    A bare NAME is a run in the default store, `./nf-runs`. Trailing slashes are ignored.

    Returns:
        The store's URI without a trailing slash ("/" and "file:///" excepted), and the name.

    Raises:
        ConfigError: no name is left, the name has other characters than a run's name may have, or an
            S3 URI has no bucket beside the name.
    """
    scheme = match.group() if (match := _SCHEME.match(uri)) else ""
    path = uri[len(scheme) :].rstrip("/")
    parent, slash, name = path.rpartition("/")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{redacted(uri)!r} names no run: got {name!r} as its name", _FIX)
    if scheme and not scheme.startswith("file:") and not parent:
        raise ConfigError(f"{redacted(uri)!r} names no run: there is a bucket or a name, not both", _FIX)
    if not scheme and not slash:
        return DEFAULT_STORE_URI, name
    return scheme + (parent.rstrip("/") or "/"), name


def join_run_uri(store_uri: str, run: str) -> str:
    """Returns the `STORE/NAME` that `split_run_uri` takes apart."""
    return store_uri + run if store_uri.endswith("/") else f"{store_uri}/{run}"
