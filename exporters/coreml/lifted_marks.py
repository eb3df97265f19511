"""Recognises how `exporters.coreml.mixtures` writes which tokens chose which experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.coreml.lifted_routes import route_of
from exporters.coreml.lifted_values import Walk, number, whole_numbers
from exporters.lifted import Columns, Last, Value
from exporters.lifted_mixture import Route, RouteSparseMixer

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


@dataclass(frozen=True, eq=False)
class Marks(Value):
    """Which tokens chose which experts: where the weights are not zero.

    Attributes:
        weights: each token's weight of each expert.
    """

    weights: Value


@dataclass(frozen=True, eq=False)
class Used(Value):
    """Which experts any token chose, or whether one did.

    Attributes:
        weights: each token's weight of each expert.
        expert: the expert; None for all of them.
    """

    weights: Value
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Zeros(Value):
    """Zeros, to which results are added, or slots that no expert has filled."""


def has_places(value: Value) -> bool:
    """Whether a value has a place for each expert, besides slots."""
    if isinstance(value, Last):
        value = value.source
    return isinstance(value, Marks | Used | Route | RouteSparseMixer)


def marks(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The comparison of experts' weights with zero, which shows what the weights are.

    They may be those of the last token alone, where other operations need all tokens' ones.
    """
    weights, zero = given["x"][0], number(given["y"][0])
    experts = walk.shape(weights)[-1:]
    if zero != 0 or not experts or experts[0] is None:
        return None
    made = weights.source if isinstance(weights, Last) else weights
    # What is lifted already for all tokens is held under its name.
    made = walk.values.get(made.name, made)
    route = made if isinstance(made, Route | RouteSparseMixer) else route_of(made, experts[0])
    if route is None:
        return None
    found: Value = route
    walk.values[made.name] = route
    if isinstance(weights, Last):
        walk.values[weights.name] = found = Last(weights.name, route, weights.positions)
    return (Marks(name, found),)


def used(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The largest of all tokens' marks."""
    source, keep = given["x"][0], whole_numbers(given["keep_dims"][0])
    if not isinstance(source, Marks) or whole_numbers(given["axes"][0]) != (0, 1) or keep != (0,):
        return None
    return (Used(name, source.weights),)


def above_zero(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Marks that are numbers become conditions again."""
    source = given["x"][0]
    return (source,) if isinstance(source, Used) and number(given["y"][0]) == 0 else None


def part(name: str, given: Given) -> Made:
    """An expert's column of weights or marks, or whether a token chose it."""
    source, begin, end = given["x"][0], *(whole_numbers(given[key][0]) for key in ("begin", "end"))
    if begin is None or end is None or end[-1] != begin[-1] + 1 or not begin[-1] >= 0:
        return None
    if isinstance(source, Used):
        squeezed = "squeeze_mask" in given and whole_numbers(given["squeeze_mask"][0]) == (1,)
        return (Used(name, source.weights, begin[0]),) if squeezed and len(begin) == 1 else None
    free = [whole_numbers(given[key][0]) for key in ("begin_mask", "end_mask") if key in given]
    if free != [(1, 1, 0), (1, 1, 0)]:
        return None
    return (Columns(name, source, begin[2], end[2]),)


def zeros(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Zeros in a value's shape."""
    return (Zeros(name),) if number(given["value"][0]) == 0 else None


def tiled(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Zeros in another shape."""
    return (Zeros(name),) if isinstance(given["x"][0], Zeros) else None
