"""Lines of 80 columns: a label, then a cell for each artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 80
# Of the columns of figures: three of them and the labels fill a line.
LABEL, COLUMN, GAP, MOST_COLUMNS = 20, 18, 2, 3


def row(
    label: str,
    cells: Sequence[str],
    style: str = "",
    *,
    label_width: int = LABEL,
    gap: int = GAP,
    column: int = COLUMN,
) -> Text:
    """A label and a cell for each artifact, at the same places in every row."""
    from rich.cells import cell_len
    from rich.text import Text

    line = Text(label, style=style)
    place = label_width
    for cell in cells:
        place += gap
        line.append(" " * max(0, place - line.cell_len) + cell, style=style)
        place += max(column, cell_len(cell))
    line.rstrip()
    return line


def wrapped(text: str, *, hanging: int = 0, style: str = "") -> list[Text]:
    """A sentence or a name in lines of the full width; those after the first are indented."""
    from rich.console import Console
    from rich.text import Text

    lines = list(Text(text, style=style).wrap(Console(), WIDTH - hanging, overflow="fold"))
    for index, line in enumerate(lines):
        line.rstrip()
        if index:
            line.pad_left(hanging)
    return lines
