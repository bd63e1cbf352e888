"""Reads docker-compose.yml as Docker does: fills in variables, parses. Entries: `read_services`, `interpolate`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yml"
COMPOSE_TEXT = COMPOSE_FILE.read_text(encoding="utf8")

# $$ is a dollar sign; ${NAME}, ${NAME:-default} and ${NAME:?message} are all that the file uses.
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::(?P<operator>[-?])(?P<text>[^}]*))?\})")


class VariableMissing(Exception):
    """A variable that the file requires has no value."""


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Fills in the variables.

    Raises:
        VariableMissing: a ${NAME:?message} is not set or empty; holds the name and the message.
    """

    def value_of(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        value = variables.get(match["name"], "")
        if value or match["operator"] is None:
            return value
        if match["operator"] == "?":
            raise VariableMissing(match["name"], match["text"])
        return match["text"]

    return _VARIABLE.sub(value_of, text)


def read_services(variables: Mapping[str, str]) -> dict[str, Any]:
    """Returns the services by name with every variable filled in.

    Raises:
        VariableMissing: as `interpolate` does.
    """
    return yaml.safe_load(interpolate(COMPOSE_TEXT, variables))["services"]
