"""Suggests a known name in place of an unknown one that is a slip of typing away from it.

Names that are merely similar are not suggested: ``mixtral`` is no misspelt ``mistral``.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

# Names of so many characters may have two slips, and shorter ones than the second number none.
_LONG: Final = 12
_SHORT: Final = 3
_MOST: Final = 10_000  # a file may hold a million names
_LONGEST: Final = 200


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that ``name`` misspells; None when there is none.

    A slip is a character too many, missing, wrong, or in its neighbour's place. Capitals, hyphens
    and the like do not count.

    Args:
        name: the name that the user gave; ``*`` in it stands for any characters.
        known: the names that exist.

    >>> nearest("int-4", ["int4", "int8"]), nearest("itn8", ["int4", "int8"])
    ('int4', 'int8')
    >>> nearest("awq-best", ["awq", "gptq"]) is None
    True
    """
    given = _plain(name)
    if len(given) > _LONGEST:  # no name is as long, and a pattern with stars would take long
        return None
    allowed = 0 if len(given) < _SHORT else 1 if len(given) < _LONG else 2
    best = None
    for candidate in islice(known, _MOST):
        found = slips(given, _plain(candidate), allowed)
        if found is not None:
            best, allowed = candidate, found - 1
            if allowed < 0:
                break
    return best


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the known name that was misspelt as a remark in brackets; empty when there is none.

    >>> did_you_mean("onxx", ["onnx", "coreml"])
    " (did you mean 'onnx'?)"
    >>> did_you_mean("tape", ["onnx", "coreml"])
    ''
    """
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"


def slips(name: str, known: str, allowed: int) -> int | None:
    """Returns how many slips lead from one name to another; None when more than are allowed.

    This is the distance of optimal string alignment, in which ``*`` stands for any characters.

    >>> slips("coremll", "coreml", 2), slips("cormel", "coreml", 2), slips("onnx", "coreml", 2)
    (1, 1, None)
    """
    if "*" not in name and abs(len(name) - len(known)) > allowed:
        return None
    before: list[int] = []
    row = list(range(len(known) + 1))
    for i, char in enumerate(name):
        last, before = before, row
        if char == "*":
            row = [before[0]]
            for j in range(len(known)):
                row.append(min(before[j + 1], row[j]))
            continue
        row = [before[0] + 1]
        for j, other in enumerate(known):
            cost = min(before[j + 1] + 1, row[j] + 1, before[j] + (char != other))
            if i and j and char == known[j - 1] and name[i - 1] == other:
                cost = min(cost, last[j - 1] + 1)
            row.append(cost)
        if min(row) > allowed:
            return None
    return row[-1] if row[-1] <= allowed else None


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum() or char == "*")
