"""The error of each weight by layer and kind of matrix, from the manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from exporters.manifest import Manifest

OUTSIDE: Final = "in no layer"
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Cell:
    """A weight's error: the L2 norm of the error over that of the weight, and its format."""

    error: float
    format: str
    share: float


@dataclass(frozen=True)
class Heat:
    """Layers by kinds of matrices; None where a layer has no such matrix.

    Attributes:
        kinds: such as ``mlp.down_proj``, in the order of a layer.
        rows: a layer's number, or a weight's name outside of the layers, and its cells.
    """

    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def heat_of(manifest: Manifest) -> Heat:
    """The errors of all matrices; vectors stay as they are and are left out."""
    largest = max((record.relative_error for record in manifest.weights.values()), default=0)
    layers: dict[int, dict[str, Cell]] = {}
    outside: dict[str, Cell] = {}
    for name, record in manifest.weights.items():
        if len(record.shape) < 2:
            continue
        error = record.relative_error
        cell = Cell(error, record.format, error / largest if largest else 0)
        found = _LAYER.fullmatch(name)
        if found is None:
            outside[name.removesuffix(".weight").removeprefix("model.")] = cell
        else:
            layers.setdefault(int(found[1]), {})[found[2]] = cell
    kinds = list(dict.fromkeys(kind for row in layers.values() for kind in row))
    rows: list[tuple[str, Sequence[Cell | None]]] = [
        (str(layer), [row.get(kind) for kind in kinds]) for layer, row in sorted(layers.items())
    ]
    if not outside:
        return Heat(kinds, rows)
    # What lies in no layer has a column of its own.
    empty: list[Cell | None] = [None] * len(kinds)
    rows = [(name, [*cells, None]) for name, cells in rows]
    rows += [(name, [*empty, cell]) for name, cell in outside.items()]
    return Heat([*kinds, OUTSIDE], rows)
