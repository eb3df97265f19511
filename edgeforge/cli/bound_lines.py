"""What `verify` prints of bounds: each figure beside its own, and whether it keeps to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeforge.cli.columns import MOST_COLUMNS, row, wrapped

if TYPE_CHECKING:
    from rich.text import Text

    from edgeforge.verification.bounds import Checked
    from edgeforge.verification.evaluation import Evaluation

# Names of figures are longer than labels of the other lines, and cells are shorter.
_LABEL, _GAP, _COLUMN = 26, 1, 17
_WORDS = {"passed": "ok", "failed": "FAIL", "doubtful": "?"}
_SIGNS = {"at most": "<", "at least": ">", "equal": "="}


def bound_lines(labels: Sequence[str], results: Sequence[Evaluation]) -> list[Text]:
    """A line for each figure that has a bound, side by side where there is room."""
    names = list(dict.fromkeys(each.name for result in results for each in _bounded(result)))
    if not names:
        return []
    if len(results) > MOST_COLUMNS or max(map(len, labels)) > _COLUMN:
        lines = []
        for label, result in zip(labels, results, strict=True):
            lines += wrapped(label, style="bold") + bound_lines(["bound"], [result])[1:]
        return lines
    lines = [_row("bounds", list(labels), style="bold")]
    for name in names:
        found = [next((c for c in result.checks if c.name == name), None) for result in results]
        lines.append(_row(name, ["" if each is None else _cell(each) for each in found]))
    return lines


def doubtful_lines(label: str, result: Evaluation) -> list[Text]:
    """A sentence for each figure of which the bound lies in the interval."""
    lines = []
    for each in result.checks:
        if each.verdict == "doubtful" and each.message and not result.other_processor:
            lines += wrapped(f"{label}: in doubt: {each.message}.", hanging=2)
    return lines


def _bounded(result: Evaluation) -> list[Checked]:
    """The figures that have a bound; those of adapters are told in a sentence each."""
    return [
        each
        for each in result.checks
        if each.limit is not None and each.sense != "equal" and not each.name.startswith("adapter.")
    ]


def _cell(checked: Checked) -> str:
    """The figure, its bound and the verdict, in as few digits as there is room for."""
    assert checked.value is not None and checked.limit is not None
    sign, word = _SIGNS[checked.sense], _WORDS[checked.verdict]
    cell = ""
    for own, limit, space in ((3, 3, " "), (3, 2, " "), (2, 2, " "), (2, 2, ""), (2, 1, "")):
        cell = f"{brief(checked.value, own)}{space}{sign}{brief(checked.limit, limit)} {word}"
        if len(cell) <= _COLUMN:
            break
    return cell


def brief(value: float, digits: int) -> str:
    """A number in the shorter of its two forms.

    >>> brief(0.000953, 2), brief(0.02, 3), brief(1234.6, 2), brief(17.0, 3)
    ('9.5e-4', '0.02', '1235', '17')
    """
    if 1 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}".removesuffix(".0")
    plain = f"{value:.{digits}g}"
    if "e" in plain or not math.isfinite(value) or value == 0:
        short, _, power = plain.partition("e")
        return f"{short}e{int(power)}" if power else short
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").removesuffix(".")
    return min(plain, f"{mantissa}e{int(power)}", key=len)


def _row(label: str, cells: Sequence[str], style: str = "") -> Text:
    return row(label, cells, style, label_width=_LABEL, gap=_GAP, column=_COLUMN)
