"""Tables that benchmarks print: medians by contender, gains, columns that line up."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A row of a comparison.

    Attributes:
        key: in the records.
        title: what the row is called, with its unit.
        scale: what the recorded number is divided by.
        digits: after the point.
        lower_is_better: which way is good.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 1
    lower_is_better: bool = True


@dataclass(frozen=True)
class Gain:
    """A column of a comparison: how many times better one contender is than another."""

    title: str
    ours: str
    theirs: str


def gain(ours: float | None, theirs: float | None, lower_is_better: bool) -> str:
    """How many times better ours is; above 1 it is.

    >>> gain(2.0, 5.0, True)
    '2.50x'
    """
    if not ours or not theirs:
        return "-"
    return f"{theirs / ours if lower_is_better else ours / theirs:.2f}x"


def comparison_rows(
    metrics: Sequence[Metric], legs: Mapping[str, Sequence[Record]], gains: Sequence[Gain]
) -> list[list[str]]:
    """The medians of every contender's records, and the gains, as a table with titles.

    Args:
        metrics: the rows; one that no contender has a number for is left out.
        legs: by contender, a record a repeat.
        gains: the last columns.
    """
    medians = {name: _medians(records) for name, records in legs.items()}
    rows = [["", *legs, *(each.title for each in gains)]]
    for metric in metrics:
        values = {name: medians[name].get(metric.key) for name in legs}
        if all(value is None for value in values.values()):
            continue
        row = [metric.title]
        for value in values.values():
            row.append("-" if value is None else f"{value / metric.scale:.{metric.digits}f}")
        for each in gains:
            row.append(gain(values[each.ours], values[each.theirs], metric.lower_is_better))
        rows.append(row)
    return rows


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Prints cells in columns, the first to the left, the others to the right."""
    widths = column_widths(rows)
    for row in rows:
        print(line_up(row, widths), flush=True)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The widest cell of every column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def line_up(row: Sequence[str], widths: Sequence[int]) -> str:
    """A row's cells at their widths, the first to the left, the others to the right.

    >>> line_up(["a", "1"], [3, 3])
    'a      1'
    """
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(cells).rstrip()


def _medians(records: Sequence[Record]) -> dict[str, float]:
    """Of every number that all of a contender's records have."""
    return {
        key: statistics.median(record[key] for record in records)
        for key, value in records[0].items()
        if isinstance(value, int | float) and all(key in record for record in records)
    }
