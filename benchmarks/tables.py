"""Tables that benchmarks print: medians by contender, gains, aligned columns."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A row of a comparison.

    Attributes:
        key: the metric's key in the records.
        title: the row's title, with the unit.
        scale: the divisor of the recorded number.
        digits: number of digits after the decimal point.
        lower_is_better: whether a lower value is better.
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
    """Returns how many times better ``ours`` is than ``theirs``; above 1 means better.

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
        metrics: the rows; a row for which no contender has a number is left out.
        legs: by contender, one record per repeat.
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
    """Prints rows in aligned columns: the first aligned left, the others right."""
    widths = column_widths(rows)
    for row in rows:
        print(line_up(row, widths), flush=True)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Returns the width of the widest cell in every column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def line_up(row: Sequence[str], widths: Sequence[int]) -> str:
    """Returns a row's cells padded to the widths: the first aligned left, the others right.

    >>> line_up(["a", "1"], [3, 3])
    'a      1'
    """
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(cells).rstrip()


def _medians(records: Sequence[Record]) -> dict[str, float]:
    """Returns the median of every number that all of a contender's records have."""
    return {
        key: statistics.median(record[key] for record in records)
        for key, value in records[0].items()
        if isinstance(value, int | float) and all(key in record for record in records)
    }
