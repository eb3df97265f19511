"""Recognises the forms in which `exporters.coreml.mixtures` writes mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporters.coreml.lifted_marks import Marks, Used, Zeros
from exporters.coreml.lifted_slots import Filled
from exporters.coreml.lifted_values import Walk, number
from exporters.lifted import Columns, Product, Value
from exporters.lifted_mixture import Combine

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


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
    """What one expert's results are gathered in where a token chose it.

    Given::

        cond(used[e], {total + kept_e}, {total})
        cond(used[e], {select(own slot of e, result_e, slots)}, {slots})

    Result: the sum, or the slots, as if the first block always ran, because zeros are added, or
    nothing is placed, where it does not
    """
    pred = given["pred"][0]
    ends = [walk.values.get(str(block.outputs[0])) for block in operation.blocks]
    if not isinstance(pred, Used) or len(ends) != 2:
        return None
    total, before = ends
    if not isinstance(total, Combine | Filled):
        return None
    if isinstance(before, Combine | Filled):
        same = type(before) is type(total) and before.weights is total.weights
        left = before.terms
    else:
        same, left = isinstance(before, Zeros), ()
    own = (pred.weights, pred.expert) == (total.weights, total.terms[-1][0])
    return (replace(total, name=name),) if same and own and total.terms[:-1] == left else None
