"""Patterns of lifted values: what an expression is made of, and the names of its operands.

A pattern takes a value and the operands that are bound so far, and returns them with those that it
binds, or None where the value is something else. A name that is bound already stands for one value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from exporters.coreml.lifted_values import Walk, number
from exporters.lifted import (
    Array,
    Constant,
    Numbers,
    Probe,
    Product,
    Scaled,
    Sum,
    Unknown,
    Value,
    at,
)
from exporters.lifted_recurrent import (
    Function,
    FunctionName,
    Gain,
)

Bound = Mapping[str, Value]
Pattern = Callable[[Value, Bound], Bound | None]


def named(name: str, pattern: Pattern | None = None) -> Pattern:
    """Any value, or one of a pattern; its name stands for it from then on."""

    def match(value: Value, bound: Bound) -> Bound | None:
        if name in bound:
            return bound if bound[name] is value else None
        inner = bound if pattern is None else pattern(value, bound)
        return None if inner is None else {**inner, name: value}

    return match


def either(*patterns: Pattern) -> Pattern:
    """The first of several patterns that holds."""

    def match(value: Value, bound: Bound) -> Bound | None:
        return next((found for each in patterns if (found := each(value, bound)) is not None), None)

    return match


def operation(kind: str, *operands: Pattern | None) -> Pattern:
    """An operation with these operands, in the order of their parameters' names; None for any."""

    def match(value: Value, bound: Bound) -> Bound | None:
        if not isinstance(value, Unknown) or value.kind != kind:
            return None
        return _all(operands, value.operands, bound)

    return match


def product(one: Pattern, other: Pattern) -> Pattern:
    """A product of two values, in either order."""

    def match(value: Value, bound: Bound) -> Bound | None:
        if isinstance(value, Product):
            return _pair(one, other, value.factors, bound)
        placed = isinstance(value, Unknown) and value.kind == "placed"
        return _pair(one, other, value.operands, bound) if placed else None  # type: ignore[attr-defined]

    return match


def total(one: Pattern, other: Pattern) -> Pattern:
    """A sum of two values, in either order."""

    def match(value: Value, bound: Bound) -> Bound | None:
        return _pair(one, other, value.terms, bound) if isinstance(value, Sum) else None

    return match


def function(name: FunctionName, source: Pattern) -> Pattern:
    """A function of each element."""

    def match(value: Value, bound: Bound) -> Bound | None:
        own = isinstance(value, Function) and value.function == name
        return source(value.source, bound) if own else None  # type: ignore[attr-defined]

    return match


def gain(name: str, source: Pattern) -> Pattern:
    """A product with a weight, which its name stands for."""

    def match(value: Value, bound: Bound) -> Bound | None:
        found = source(value.source, bound) if isinstance(value, Gain) else None
        return None if found is None else named(name)(value, found)

    return match


def matmul(x: Pattern, y: Pattern, turned: str = "") -> Pattern:
    """A matrix product; of the operands in ``turned``, rows and columns change places."""
    return operation("matmul", flag("x" in turned), flag("y" in turned), x, y)


def flag(wanted: bool) -> Pattern:
    """A constant that says yes or no."""
    return constant(lambda found: found == wanted)


def constant(holds: Callable[[float], bool]) -> Pattern:
    """A constant number."""

    def match(value: Value, bound: Bound) -> Bound | None:
        found = number(value)
        return bound if found is not None and holds(found) else None

    return match


def numbers(walk: Walk, wanted: Callable[[Probe], Array]) -> Pattern:
    """Numbers that are computed for each call, which have these values in any shape."""

    def match(value: Value, bound: Bound) -> Bound | None:
        if not isinstance(value, Numbers | Constant):
            return None
        for index, probe in enumerate(walk.probes):
            if not np.array_equal(at(value, index).ravel(), wanted(probe).ravel()):
                return None
        return bound

    return match


def times(walk: Walk, source: Pattern, wanted: Callable[[Probe], Array]) -> Pattern:
    """A value times numbers that are computed for each call."""
    by_numbers = product(numbers(walk, wanted), source)

    def match(value: Value, bound: Bound) -> Bound | None:
        if not isinstance(value, Scaled):
            return by_numbers(value, bound)
        same = all(bool((wanted(probe) == value.factor).all()) for probe in walk.probes)
        return source(value.source, bound) if same else None

    return match


def _all(patterns: Sequence[Pattern | None], values: Sequence[Value], bound: Bound) -> Bound | None:
    if len(patterns) != len(values):
        return None
    found: Bound | None = bound
    for pattern, value in zip(patterns, values, strict=True):
        if found is not None and pattern is not None:
            found = pattern(value, found)
    return found


def _pair(one: Pattern, other: Pattern, values: tuple[Value, ...], bound: Bound) -> Bound | None:
    found = _all((one, other), values, bound)
    return _all((one, other), values[::-1], bound) if found is None else found
