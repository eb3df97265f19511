"""Recognises the form in which `exporters.coreml.convolution` writes short convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporters.coreml.lifted_values import (
    Held,
    Part,
    Walk,
    cache_label,
    number,
    whole_numbers,
)
from exporters.lifted import (
    Numbers,
    Product,
    Recent,
    ShortConv,
    Sum,
    Value,
)
from exporters.lifted_recurrent import (
    Previous,
)

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


@dataclass(frozen=True, eq=False)
class Kept(Value):
    """What a state holds of the tokens before, or zeros.

    Attributes:
        held: the state.
        ignored: whether there are zeros, for each probe.
    """

    held: Held
    ignored: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Rows(Value):
    """The tokens before and those of the call, one after the other."""

    before: Kept
    source: Value


@dataclass(frozen=True, eq=False)
class Shifted(Value):
    """Some of these rows.

    Attributes:
        rows: all of them.
        before: how many are before these; None where it depends on the number of tokens.
        behind: how many are behind these.
        count: how many these are; None where it depends on the number of tokens.
    """

    rows: Rows
    before: int | None
    behind: int
    count: int | None


@dataclass(frozen=True, eq=False)
class Turned(Value):
    """A convolution's weight with its columns as rows."""

    part: Part


@dataclass(frozen=True, eq=False)
class Factors(Value):
    """One column of a convolution's weight."""

    part: Part
    index: int


def select(walk: Walk, name: str, given: Given) -> Made:
    """What a state holds where a condition is true, zeros elsewhere."""
    condition, held, other = (given[key][0] for key in ("cond", "a", "b"))
    if not isinstance(condition, Numbers) or not isinstance(held, Held) or number(other) != 0:
        return None
    if any(array.size != 1 for array in condition.arrays):
        return None
    return (Kept(name, held, tuple(not array.any() for array in condition.arrays)),)


def joined(name: str, values: tuple[Value, ...], axis: tuple[int, ...] | None) -> Made:
    """The tokens before, then those of the call."""
    if len(values) != 2 or axis != (1,) or not isinstance(values[0], Kept):
        return None
    return (Rows(name, values[0], values[1]),)


def shifted(walk: Walk, name: str, given: Given) -> Made:
    """Rows of the second of three axes."""
    rows = given["x"][0]
    begin, end = (whole_numbers(given[key][0]) for key in ("begin", "end"))
    free = [whole_numbers(given[key][0]) for key in ("begin_mask", "end_mask")]
    if not isinstance(rows, Rows) or begin is None or end is None or free[0] != (1, 0, 1):
        return None
    if free[1] not in ((1, 0, 1), (1, 1, 1)):
        return None
    length, first = walk.shape(rows)[1], begin[1]
    last = end[1] if free[1] == (1, 0, 1) else 0
    if length is None:
        before, count = (first, None) if first >= 0 else (None, -first)
        found = Shifted(name, rows, before, -last, count)
    else:
        found = Shifted(name, rows, first, (length - last) % length, last - first)
    if found.behind < 0:
        return None
    kept(walk, name, found)
    return (found,)


def kept(walk: Walk, written: str, value: Value) -> None:
    """Notes that an output or a state gets a call's last rows."""
    if isinstance(value, Shifted) and (
        written in walk.states or written in walk.operations.outputs
    ):
        walk.kept[value.rows.name] = (written, value.count, value.behind)


def turned(given: Given) -> Made:
    """A convolution's weight, transposed."""
    part = given["x"][0]
    if not isinstance(part, Part) or part.values is None or part.values.ndim != 2:
        return None
    return (Turned(part.name, part),)


def columns(names: list[str], source: Turned, sizes: tuple[int, ...]) -> Made:
    """A convolution's weight column by column."""
    if any(size != 1 for size in sizes):
        return None
    return tuple(Factors(name, source.part, index) for index, name in enumerate(names))


def convolution(walk: Walk, name: str, pair: tuple[Value, Value]) -> ShortConv | None:
    """``rows[: -2] * weight[:, 0] + rows[1 : -1] * weight[:, 1] + rows[2 :] * weight[:, 2]``."""
    terms = _terms(pair)
    if terms is None:
        return None
    (first, factors), *_ = terms
    values, rows = factors.part.values, first.rows
    assert values is not None
    width = values.shape[1]
    wanted = [(index, width - 1 - index, index) for index in range(width)]
    found = [(part.before, part.behind, column.index) for part, column in terms]
    same = all(part.rows is rows and column.part is factors.part for part, column in terms)
    if found != wanted or not same:
        return None
    written, count, behind = walk.kept.get(rows.name, ("", 0, 0))
    label = cache_label(written) if (count, behind) == (width - 1, 0) else "nowhere"
    recent = Recent(cache_label(rows.before.held.cache), label, rows.before.ignored)
    return ShortConv(name, rows.source, factors.part.weight, values.astype(np.float32), recent)


def previous(walk: Walk, value: Value) -> Value:
    """Rows of ``[before, x]`` without the last: each token's predecessor; others as they are."""
    if not isinstance(value, Shifted) or (value.before, value.behind) != (0, 1):
        return value
    written, count, behind = walk.kept.get(value.rows.name, ("", 0, 0))
    label = cache_label(written) if (count, behind) == (1, 0) else "nowhere"
    before = value.rows.before
    recent = Recent(cache_label(before.held.cache), label, before.ignored)
    found = Previous(value.name, value.rows.source, recent)
    walk.values[value.name] = found
    return found


def _terms(pair: tuple[Value, Value]) -> list[tuple[Shifted, Factors]] | None:
    """The products of a sum from left to right; None for a sum of anything else."""
    before, last = pair
    if not isinstance(last, Product):
        return None
    rows, factors = last.factors
    if not isinstance(rows, Shifted) or not isinstance(factors, Factors):
        return None
    found: list[tuple[Shifted, Factors]] | None = []
    if isinstance(before, Sum):
        found = _terms(before.terms)
    elif isinstance(before, Product):
        one, other = before.factors
        if isinstance(one, Shifted) and isinstance(other, Factors):
            found = [(one, other)]
    return [*found, (rows, factors)] if found else None
