"""What to say to a name that is not known: those near it, or all there are. Entries: `did_you_mean`, `near_names`."""

import difflib
from collections.abc import Iterable

_MOST = 3
_LIKENESS = 0.5


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "", otherwise: str = "") -> str:
    """Returns one action for the end of an error.

    Example: did_you_mean("vgg11", ["vgg11_bn", "convnet"]) == "did you mean vgg11_bn?".

    Args:
        name: as it was given.
        known: all names.
        prefix: put before each name that is shown.
        otherwise: what to say where no name is near; left out, all names are listed.
    """
    known = list(known)
    near = " or ".join(prefix + one for one in near_names(name, known))
    return f"did you mean {near}?" if near else otherwise or f"one of {', '.join(known)}"


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Returns the three names that are most alike, the most alike first; none where none is like it."""
    return difflib.get_close_matches(name, list(known), n=_MOST, cutoff=_LIKENESS)
