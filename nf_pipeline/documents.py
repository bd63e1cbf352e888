"""JSON that somebody else may have written or changed, checked against a dataclass before anything uses it.

Every record of a run that is read back goes through here, so that what is wrong with it shows at once, with the
field's name, and never as a TypeError somewhere later. Knows nothing of stores or of what the records mean; says
what is wrong as a ValueError, which the caller turns into an error that names the object. Entries: `parse_json`,
`read_fields`.
"""

import functools
import json
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

RecordT = TypeVar("RecordT")

_INT64 = range(-(2**63), 2**63)
_SHOWN_CHARS = 80


def parse_json(data: bytes | bytearray | memoryview) -> Any:
    """Reads one JSON document.

    Raises:
        ValueError: it is no JSON, is nested too deeply for Python, or has a whole number of more than 64 bits.
    """
    try:
        return json.loads(bytes(data), parse_int=_parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_fields(kind: type[RecordT], document: Any) -> RecordT:
    """Makes a dataclass from the JSON document of its fields; types are those of the annotations, without exception.

    Args:
        kind: dataclass; lists become tuples where it has tuples, other dataclasses are made inside.
        document: as `parse_json` returned it.

    Raises:
        ValueError: a field is missing, unknown or of another type; names the first one.
    """
    if not isinstance(document, dict):
        raise ValueError(f"got {type(document).__name__}, want an object")
    unknown = document.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: unknown field"[:_SHOWN_CHARS])
    return check_types(kind, document)


def check_types(kind: type[RecordT], document: Any) -> RecordT:
    """Makes a dataclass from the fields that it knows; others are ignored.

    Raises:
        ValueError: a field is missing or of another type; names the first one.
    """
    try:
        return _reader(kind).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "document"
        raise ValueError(f"{place}: {problem['msg']}, got {repr(problem['input'])[:_SHOWN_CHARS]}") from None


@functools.cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _parse_int(digits: str) -> int:
    number = int(digits)  # a ValueError for thousands of digits
    if number not in _INT64:
        raise ValueError(f"the number {digits[:_SHOWN_CHARS]} has more than 64 bits")
    return number
