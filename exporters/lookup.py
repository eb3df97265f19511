"""Finds a target by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from exporters.errors import ExportError
from quant.suggestion import did_you_mean

Row = TypeVar("Row")


def look_up(name: str, targets: Mapping[str, Row]) -> Row:
    """Returns the target of a name.

    Raises:
        ExportError: there is no target of this name.
    """
    if name in targets:
        return targets[name]
    hint = did_you_mean(name, targets)
    raise ExportError(f"there is no target {name!r}{hint}; known: {', '.join(targets)}")
