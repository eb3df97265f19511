"""Rotations by the name the command line takes (`edgeforge.model.rotated_weights` makes them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgeforge.errors import UsageError
from quant.suggestion import did_you_mean


@dataclass(frozen=True)
class RotationKind:
    """What is rotated.

    Attributes:
        about: one line.
        residual: whether the residual stream is.
        untied: whether a tied head becomes a matrix of its own.
    """

    about: str
    residual: bool
    untied: bool = False


ROTATIONS: Final[Mapping[str, RotationKind]] = {
    "hadamard": RotationKind(
        "residual stream and values; a tied head stays tied behind a float16 matrix", True
    ),
    "hadamard-untied": RotationKind(
        "the same, but a tied head becomes a matrix of its own", True, untied=True
    ),
    "hadamard-values": RotationKind("values alone, which costs nothing in any model", False),
}


def find_rotation(name: str) -> RotationKind:
    """A rotation by name.

    Raises:
        UsageError: there is none.
    """
    if name in ROTATIONS:
        return ROTATIONS[name]
    hint = did_you_mean(name, ROTATIONS)
    raise UsageError(f"there is no rotation {name!r}{hint}; known: {', '.join(ROTATIONS)}")
