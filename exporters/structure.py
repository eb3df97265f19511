"""Tables of what a target's files hold, read from the files, for people and machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Cell = str | int


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: what it lists; every section of an artifact has a different title.
        columns: the columns' headings.
        rows: the rows, each with one cell for each column; sizes are in bytes.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def count_elements(shape: Iterable[int]) -> int:
    """Returns how many elements a shape has.

    Raises:
        ValueError: a dimension is negative, or there are more than 63 bits can count.

    >>> count_elements((3, 4))
    12
    """
    elements = 1
    for dim in shape:
        if dim < 0 or max(elements, 1) * dim >= 2**63:
            raise ValueError(f"it has a tensor with a dimension of {dim}, which none can have")
        elements *= dim
    return elements


def to_json(sections: Iterable[Section]) -> dict[str, object]:
    """Returns the sections by title, each as a list of rows that map columns to cells.

    >>> to_json([Section("Files", ("name", "bytes"), (("a", 3),))])
    {'Files': [{'name': 'a', 'bytes': 3}]}
    """
    return {
        section.title: [dict(zip(section.columns, row, strict=True)) for row in section.rows]
        for section in sections
    }
