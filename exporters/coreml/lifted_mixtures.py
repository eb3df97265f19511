"""Recognises the forms in which `exporters.coreml.mixtures` writes mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from exporters.coreml.lifted_routes import route_of
from exporters.coreml.lifted_values import Walk, number, whole_numbers
from exporters.lifted import Columns, Product, Value
from exporters.lifted_mixture import Combine, Route, RouteSparseMixer

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
    """Zeros, to which results are added."""


PARTED: Final = (Marks, Used, Route, RouteSparseMixer)
"""What has a place for each expert."""


def marks(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """The comparison of experts' weights with zero, which shows what the weights are."""
    weights, zero = given["x"][0], number(given["y"][0])
    experts = walk.shape(weights)[-1:]
    if zero != 0 or not experts or experts[0] is None:
        return None
    route = route_of(weights, experts[0])
    if route is None:
        return None
    walk.values[weights.name] = route
    return (Marks(name, route),)


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


def kept(name: str, given: Given) -> Made:
    """An expert's results times its weights, zero for tokens that did not choose it.

    Given::

        select(marks[..., e], result * weights[..., e], 0)

    Result: ``Combine(weights, ((e, result),))``
    """
    condition, product, other = (given[key][0] for key in ("cond", "a", "b"))
    if not isinstance(condition, Columns) or not isinstance(condition.source, Marks):
        return None
    weights, expert = condition.source.weights, condition.start
    if not isinstance(product, Product) or number(other) != 0:
        return None
    for column, result in (product.factors, product.factors[::-1]):
        own = isinstance(column, Columns) and column.source is weights
        if own and column.start == expert:  # type: ignore[attr-defined]
            return (Combine(name, weights, ((expert, result),)),)
    return None


def added(name: str, pair: tuple[Value, Value]) -> Value | None:
    """The sum of two sums of experts' results, of which one may be zeros yet."""
    one, other = pair
    if isinstance(one, Zeros) and isinstance(other, Combine):
        return Combine(name, other.weights, other.terms)
    if not isinstance(one, Combine) or not isinstance(other, Combine):
        return None
    if one.weights is not other.weights:
        return None
    return Combine(name, one.weights, one.terms + other.terms)


def cond(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """A sum that one expert's results are added to where a token chose it.

    Given::

        cond(used[e], {total + kept_e}, {total})

    Result: the sum as if the first block always ran, because zeros are added where it does not
    """
    pred = given["pred"][0]
    ends = [walk.values.get(str(block.outputs[0])) for block in operation.blocks]
    if not isinstance(pred, Used) or len(ends) != 2 or not isinstance(ends[0], Combine):
        return None
    total, before = ends[0], ends[1]
    last = total.terms[-1]
    left = before.terms if isinstance(before, Combine) else ()
    same = isinstance(before, Zeros) or (
        isinstance(before, Combine) and before.weights is total.weights
    )
    if (
        not same
        or total.terms[:-1] != left
        or (pred.weights, pred.expert)
        != (
            total.weights,
            last[0],
        )
    ):
        return None
    return (Combine(name, total.weights, total.terms),)
