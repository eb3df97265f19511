"""Recognises the forms in which `exporters.coreml.recurrence` writes recurrences.

A memory is known when it is written. Then what it was made of gives the operands, and among the
values since it was read there must be the one that the operands give to read from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from exporters.coreml import lifted_memory
from exporters.coreml.lifted_memory import Remembered
from exporters.coreml.lifted_patterns import (
    Bound,
    Pattern,
    constant,
    flag,
    function,
    gain,
    matmul,
    named,
    numbers,
    operation,
    product,
    times,
    total,
)
from exporters.coreml.lifted_values import Part, Walk
from exporters.lifted import (
    Array,
    Probe,
    Recent,
    StoredWeight,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    Gain,
    Recurrence,
)

_FORGOTTEN = -104.0  # float32's exponential of this, and of every lower number, is 0


def written(walk: Walk, state: str, value: Value) -> None:
    """Notes what a state or an output gets; recognises the recurrence when it is a memory."""
    found = lifted_memory.noted(walk, state, value)
    if found is None:
        return
    after, label = found
    for form in _forms(walk):
        bound = form.after(after, {})
        if bound is None or not isinstance(bound["before"], Remembered):
            continue
        for name, made in _since(walk, bound["before"]):
            read = form.read(made, bound)
            lifted = None if read is None else _recurrence(walk, name, read, label)
            if lifted is not None:
                for other, same in walk.values.items():
                    if same is made:
                        walk.values[other] = lifted
                return


def _since(walk: Walk, before: Remembered) -> Iterator[tuple[str, Value]]:
    """The values since a memory was read, and their names."""
    found = list(walk.values.items())
    start = next(index for index, (_, value) in enumerate(found) if value is before)
    return iter(found[start:])


def _recurrence(walk: Walk, name: str, bound: Bound, written: str) -> Recurrence | None:
    before, decay, bonus = bound["before"], bound["decay"], bound.get("bonus")
    assert isinstance(before, Remembered)
    _, heads, rows, columns = (size or 0 for size in walk.shape(before))
    key_heads, rest = divmod(math.prod(size or 0 for size in walk.shape(bound["query"])[2:]), rows)
    if rest:
        return None
    weight: StoredWeight | None = None
    if isinstance(decay, Part):
        weight = decay.weight
    return Recurrence(
        name,
        bound["query"],
        bound["key"],
        bound["value"],
        decay if weight is None else weight,
        decay.values if isinstance(decay, Part) else None,
        bonus.weight if isinstance(bonus, Gain) else None,
        bonus.values if isinstance(bonus, Gain) else None,
        bound.get("beta"),
        (heads, key_heads, rows, columns),
        Recent(before.state, written, before.ignored),
    )


@dataclass(frozen=True)
class _Form:
    """One form of a recurrence: the memory after a call, and what is read of it."""

    after: Pattern
    read: Pattern


def _forms(walk: Walk) -> Iterator[_Form]:
    one = all(probe.count == 1 for probe in walk.probes)
    for delta, early in ((True, False), (False, True), (False, False)):
        if one:
            yield _step(delta, early)
        else:
            for sums in (_of_each(walk, early, False), _of_each(walk, early, True),
                         _of_constant(walk, early)):  # fmt: skip
                yield _closed(walk, sums, delta, early)


def _step(delta: bool, early: bool) -> _Form:
    """The form of one token."""
    query, key, before = named("query"), named("key"), named("before")
    held = named("held", product(before, function("exp", named("decay"))))
    added = named("value")
    if delta:
        new = operation("sub", named("value"), matmul(key, held))
        added = product(named("beta"), new)
    after = named("after", total(held, matmul(key, added, "x")))
    if early:
        return _Form(after, total(matmul(query, before), _own()))
    return _Form(after, matmul(query, named("after")))


def _own() -> Pattern:
    """What a token's own key gives it: ``sum(q * bonus * k) * v``."""
    terms = product(gain("bonus", named("query")), named("key"))
    return product(operation("reduce_sum", None, None, terms), named("value"))


@dataclass(frozen=True)
class _Sums:
    """The sums of log decays of `exporters.coreml.recurrence`, as patterns."""

    since: Pattern
    rest: Pattern
    whole: Pattern
    between: Pattern
    of_rows: bool


def _bounded() -> Pattern:
    return operation("maximum", named("decay"), constant(lambda found: found <= _FORGOTTEN))


def _of_each(walk: Walk, early: bool, of_rows: bool) -> _Sums:
    def running(source: Pattern, back: int, exclusive: bool, reverse: bool) -> Pattern:
        inner = operation("cumsum", None, flag(exclusive), flag(reverse), source)

        def match(value: Value, bound: Bound) -> Bound | None:
            found = inner(value, bound)
            if found is None or not isinstance(value, Unknown):
                return None
            axis = len(walk.shape(value)) - back
            return constant(lambda given: given == axis)(value.operands[0], found)

        return match

    behind = product(numbers(walk, _mask(np.greater)), _bounded())
    return _Sums(
        running(_bounded(), 2, early, False),
        running(_bounded(), 2, True, True),
        operation("reduce_sum", constant(lambda axis: axis == -2), flag(False), _bounded()),
        running(behind, 3 if of_rows else 2, early, False),
        of_rows,
    )


def _of_constant(walk: Walk, early: bool) -> _Sums:
    def of(count: Callable[[Array, int], Array]) -> Pattern:
        return times(walk, _bounded(), lambda probe: count(np.arange(probe.count), probe.count))

    def between(places: Array, _: int) -> Array:
        found: Array = np.maximum(places[:, None] - places[None] - early, 0)
        return found

    return _Sums(
        of(lambda places, _: places + (not early)),
        of(lambda places, number: number - 1 - places),
        of(lambda _, number: np.array([number])),
        of(between),
        of_rows=True,
    )


def _mask(relation: Callable[[Array, Array], Array]) -> Callable[[Probe], Array]:
    def of(probe: Probe) -> Array:
        places = np.arange(probe.count)
        return relation(places[:, None], places[None])

    return of


def _closed(walk: Walk, sums: _Sums, delta: bool, early: bool) -> _Form:
    """The form of many tokens."""
    query, key, before = named("query"), named("key"), named("before")
    since = named("since", function("exp", sums.since))
    between = named("between", function("exp", sums.between))

    def weights(x: Pattern, *, strict: bool) -> Pattern:
        if sums.of_rows:
            terms = product(product(between, x), key)
            last = constant(lambda axis: axis == -1)
            found = operation("reduce_sum", last, flag(False), terms)
        else:
            found = product(matmul(x, key, "y"), between)
        relation = np.greater if strict else np.greater_equal
        return product(numbers(walk, _mask(relation)), found)

    added = named("value")
    if delta:
        links = named("links", product(weights(key, strict=True), named("beta")))
        found = matmul(product(key, since), before)
        wanted = product(named("beta"), operation("sub", named("value"), found))
        added = named("added", matmul(_inverse(walk, links), wanted))
    left = product(key, function("exp", sums.rest))
    held = product(before, function("exp", sums.whole))
    after = total(held, matmul(left, added, "x"))
    old = matmul(product(query, since), before)
    new = matmul(weights(query, strict=early), named("added") if delta else added)
    read = total(old, new)
    return _Form(after, total(read, _own()) if early else read)


def _inverse(walk: Walk, links: Pattern) -> Pattern:
    """The inverse of one plus the links, by blocks whose size doubles."""
    most = max(probe.count for probe in walk.probes)
    inverse, size = numbers(walk, _mask(np.equal)), 1
    while size < most:

        def apart(t: Array, j: Array, size: int = size) -> Array:
            found: Array = (t // (2 * size) == j // (2 * size)) & (t // size != j // size)
            return found

        inner = named(f"inverse_{size}", inverse)
        part = product(numbers(walk, _mask(apart)), links)
        if size > 1:
            part = matmul(matmul(inner, part), inner)
        inverse = operation("sub", inner, part)
        size *= 2
    return inverse
