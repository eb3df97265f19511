"""Rows of tables that list weights: experts of a layer that are stored alike share one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from edgeforge.families.expert_names import expert_of
from exporters.manifest_records import WeightRecord

_MANY = 3
"""Fewer experts than this have a row each."""


def weight_rows(weights: Mapping[str, WeightRecord]) -> list[tuple[str, str, str, str, str]]:
    """Returns name, shape, format, algorithm and relative error of each row, in the plan's order.

    Args:
        weights: the records, by weight name.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, record in weights.items():
        found = expert_of(name)
        key: tuple[object, ...] = (name,)
        if found is not None:
            alike = record.shape, record.format, record.algorithm, record.activation
            key = (found[0], name.rsplit(".", 2)[1], *alike)
        groups.setdefault(key, []).append(name)
    rows = []
    for names in groups.values():
        parts = [[name] for name in names] if len(names) < _MANY else [names]
        rows += [_row(part, weights) for part in parts]
    return rows


def _row(names: list[str], weights: Mapping[str, WeightRecord]) -> tuple[str, str, str, str, str]:
    first = weights[names[0]]
    errors = [weights[name].relative_error for name in names]
    least, most = min(errors), max(errors)
    error = f"{most:.2e}" if most else "exact"
    if f"{least:.2e}" != f"{most:.2e}":
        error = f"{least:.2e} to {error}"
    shape = " x ".join(map(str, first.shape))
    return _name(names), shape, first.format, first.algorithm, error


def _name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    experts = [found[1] for name in names if (found := expert_of(name)) is not None]
    return re.sub(r"(?<=\.experts\.)\d+", f"{{{ranges(experts)}}}", names[0])


def ranges(numbers: list[int]) -> str:
    """Returns numbers as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    ordered = sorted(numbers)
    ends = [index + 1 for index, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    spans = pairwise([0, *ends, len(ordered)])
    runs = [(ordered[start], ordered[stop - 1]) for start, stop in spans]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
