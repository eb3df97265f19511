"""Recognises the slots of a mixture of attention heads, as `exporters.coreml.slots` writes them.

Other parts of `exporters.coreml.lifting` let views pass, whatever shapes they have. Here a wrong
view or a transposition would put an expert's result in the place of another's, so shapes are
compared as the package states them, and only casts and views may lie between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.coreml.lifted_marks import Marks, Zeros
from exporters.coreml.lifted_values import Walk, number, whole_numbers
from exporters.lifted import Constant, Value
from exporters.lifted_mixture import ChosenSlots, Slots

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None
Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Counted(Value):
    """How many experts up to each one a token chose: ``[1, t, E]``.

    Attributes:
        weights: each token's weight of each expert.
    """

    weights: Value


@dataclass(frozen=True, eq=False)
class Places(Value):
    """The slot of each token that an expert has, from 1; 0 where the token did not choose it.

    Attributes:
        weights: each token's weight of each expert.
        expert: the expert, for ``[t, 1, 1, 1]``; None for all of them, ``[1, t, E]``.
    """

    weights: Value
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Own(Value):
    """Which slot of each token is an expert's: ``bool[t, 1, chosen, 1]``.

    Attributes:
        weights: each token's weight of each expert.
        expert: the expert.
        chosen: how many slots a token has.
    """

    weights: Value
    expert: int
    chosen: int


@dataclass(frozen=True, eq=False)
class Filled(Value):
    """Slots that some experts' results stand in: ``[t, heads, chosen, width]``.

    Attributes:
        weights: each token's weight of each expert.
        terms: as of `Slots`.
        chosen: how many slots a token has.
    """

    weights: Value
    terms: tuple[tuple[int, Value], ...]
    chosen: int


@dataclass(frozen=True, eq=False)
class Read(Value):
    """Slots of which all are zero but an expert's own: ``[t, heads, chosen, width]``.

    Attributes:
        source: all slots.
        own: the expert's own ones.
    """

    source: Value
    own: Own


@dataclass(frozen=True, eq=False)
class Summed(Value):
    """An expert's own slot of each token: ``[t, heads, width]``.

    Attributes:
        read: what was added up.
    """

    read: Read


def counted(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The running sum of a token's marks."""
    source, axis = given["x"][0], whole_numbers(given["axis"][0])
    plain = [whole_numbers(given[key][0]) for key in ("exclusive", "reverse")] == [(0,), (0,)]
    if not isinstance(source, Marks) or axis != (-1,) or not plain:
        return None
    if len(walk.shape(source)) != 3:
        return None
    return (Counted(name, source.weights),) if _as_made(walk, operation, "x", source) else None


def part(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """An expert's places: a column of all experts' ones, of which the tokens stand outermost."""
    source, shape = given["x"][0], _shape(walk, operation, "x")
    keys = ("begin", "end", "begin_mask", "end_mask")
    if not isinstance(source, Places) or set(given) != {"x", *keys}:
        return None
    _, tokens, experts = walk.shape(source)
    begin, end, *free = (whole_numbers(given[key][0]) for key in keys)
    alone = shape == (tokens, 1, 1, experts) and free == [(1, 1, 1, 0)] * 2
    if not alone or begin is None or end is None or not _from(walk, operation, "x", source):
        return None
    if begin[-1] < 0 or end[-1] != begin[-1] + 1:
        return None
    return (Places(name, source.weights, begin[-1]),)


def own(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The comparison of an expert's places with the numbers of all slots."""
    place, numbers = given["x"][0], given["y"][0]
    if not isinstance(place, Places) or place.expert is None or not isinstance(numbers, Constant):
        return None
    if not _as_made(walk, operation, "x", place):
        return None
    chosen = numbers.array.size
    wanted = np.arange(1, chosen + 1).reshape(1, 1, chosen, 1)
    if not np.array_equal(numbers.array, wanted):
        return None
    return (Own(name, place.weights, place.expert, chosen),)


def select(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Numbers of slots where experts are chosen; slots filled, or read, where they are own ones.

    Given::

        select(marks, cumsum(marks), 0)
        select(own, result, slots)
        select(own, slots, 0)
    """
    condition, source, other = (given[key][0] for key in ("cond", "a", "b"))
    if isinstance(condition, Marks) and isinstance(source, Counted):
        same = condition.weights is source.weights and number(other) == 0
        whole = _as_made(walk, operation, "cond", condition)
        whole = whole and _as_made(walk, operation, "a", source)
        return (Places(name, source.weights),) if same and whole else None
    shape = _shape(walk, operation, "a")
    if not isinstance(condition, Own) or len(shape) != 4:
        return None
    tokens, heads, slots, width = shape
    if not _as_made(walk, operation, "cond", condition) or tokens != walk.shape(condition)[0]:
        return None
    if heads is None or slots is None or width is None:
        return None
    if (1, tokens, heads * slots * width) not in _shapes(walk, operation, "a"):
        return None
    if number(other) == 0:
        return (Read(name, source, condition),) if slots == condition.chosen else None
    all_slots = (tokens, heads, condition.chosen, width)
    if slots != 1 or _shape(walk, operation, "b") != all_slots:
        return None
    before: tuple[tuple[int, Value], ...] = ()
    if isinstance(other, Filled):
        if not _as_made(walk, operation, "b", other) or other.weights is not condition.weights:
            return None
        before = other.terms
    elif not isinstance(other, Zeros):
        return None
    terms = (*before, (condition.expert, source))
    return (Filled(name, condition.weights, terms, condition.chosen),)


def summed(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The sum over slots of which all are zero but an expert's own."""
    source = given["x"][0]
    if not isinstance(source, Read) or not _as_made(walk, operation, "x", source):
        return None
    whole = whole_numbers(given["axes"][0]) == (2,) and whole_numbers(given["keep_dims"][0]) == (0,)
    return (Summed(name, source),) if whole else None


def joined(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """A view of slots, or of an expert's own one, as ``[1, t, columns]``; None for another view."""
    source = given["x"][0]
    if not isinstance(source, Filled | Summed) or not _as_made(walk, operation, "x", source):
        return None
    tokens, heads, *rest = walk.shape(source)
    columns = int(np.prod([size or 0 for size in (heads, *rest)]))
    if walk.operations.shapes.get(name) != (1, tokens, columns) or heads is None:
        return None
    if isinstance(source, Filled):
        return (Slots(name, source.weights, source.terms, source.chosen, heads),)
    own = source.read.own
    found = ChosenSlots(name, source.read.source, own.weights, own.expert, own.chosen, heads)
    return (found,)


def _names(walk: Walk, operation: Any, key: str) -> list[str]:
    """The name of an operand, and of all that casts and views made it of, last first."""
    names = [str(operation.inputs[key].arguments[0].name)]
    while names[-1] in walk.cast_from:
        names.append(walk.cast_from[names[-1]])
    return names


def _shapes(walk: Walk, operation: Any, key: str) -> list[Shape]:
    return [walk.operations.shapes.get(name, ()) for name in _names(walk, operation, key)]


def _shape(walk: Walk, operation: Any, key: str) -> Shape:
    return _shapes(walk, operation, key)[0]


def _from(walk: Walk, operation: Any, key: str, value: Value) -> bool:
    """Whether only casts and views lie between a value and an operand."""
    return value.name in _names(walk, operation, key)


def _as_made(walk: Walk, operation: Any, key: str, value: Value) -> bool:
    """Whether an operand has the shape that a value was made in, and only casts lie between."""
    return _from(walk, operation, key, value) and _shape(walk, operation, key) == walk.shape(value)
