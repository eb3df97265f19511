"""What a target's files hold, read from the files themselves: tables for people and machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Cell = str | int


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: what it lists; no two sections of an artifact share one.
        columns: headings.
        rows: a cell for each column; sizes are in bytes.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def to_json(sections: Iterable[Section]) -> dict[str, object]:
    """Sections by title, each a list of rows by column.

    >>> to_json([Section("Files", ("name", "bytes"), (("a", 3),))])
    {'Files': [{'name': 'a', 'bytes': 3}]}
    """
    return {
        section.title: [dict(zip(section.columns, row, strict=True)) for row in section.rows]
        for section in sections
    }
