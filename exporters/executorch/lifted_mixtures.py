"""Lifts a mixture's experts: which tokens each takes, its delegate, and the sum of the results.

It reads what `exporters.executorch.mixtures` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from exporters.executorch.lifted_method import Guard, Method
from exporters.executorch.lifted_routes import sampled_kernel, weights_of
from exporters.executorch.lifted_values import operands
from exporters.lifted import Constant, Product, Sum, Unknown, Value, are_numbers, at
from exporters.lifted_mixture import ChosenTokens, Combine, Route, RouteSparseMixer

_LARGEST: Final = "largest weight of each expert"
_NOTHING: Final = "zeros"
_COLUMN: Final = "weights of an expert"
_PLACES: Final = "places of an expert's weights"
_WHICH: Final = "tokens of an expert"
_FACTOR: Final = "weights of an expert's tokens"
_OLD: Final = "sums of an expert's tokens"


def _name(method: Method, arguments: list[int]) -> str:
    return f"{method.name}, value {arguments[-1]}"


def _is_route(value: Value) -> bool:
    return isinstance(value, Route | RouteSparseMixer)


def _largest(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``amax(weights, [0, 1])``."""
    weights, axes = weights_of(method, arguments[0]), method.records[arguments[1]]
    keep = method.value(arguments[2])
    if not _is_route(weights) or axes.table != "IntList" or not are_numbers((keep,)):
        return False
    along = [int(at(method.value(item), 0)) for item in axes["items"]]
    if along != [0, 1] or bool(at(keep, 0)):
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _LARGEST, (weights,))
    return True


def _greater(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Which experts any token chose, ``largest > 0``; or a step of a choice of experts."""
    largest, bound = operands(method.value(arguments[0]), _LARGEST), method.value(arguments[1])
    if largest is None:
        return sampled_kernel(method, kernel, arguments)
    if not are_numbers((bound,)) or float(at(bound, 0)) != 0:
        return False
    experts = method.sizes(arguments[-1])[0]
    method.guards = Guard(method.offset(arguments[-1]), experts, largest[0])
    method.values[arguments[-1]] = Unknown(_name(method, arguments), "chosen experts", largest)
    return True


def _zeros(method: Method, kernel: str, arguments: list[int]) -> bool:
    """What results are added to; or a step of a choice of experts."""
    value, filled = method.value(arguments[0]), method.value(arguments[1])
    if id(value) in method.samples:
        return sampled_kernel(method, kernel, arguments)
    if not are_numbers((filled,)) or float(at(filled, 0)) != 0:
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _NOTHING)
    return True


def _select(method: Method, kernel: str, arguments: list[int]) -> bool:
    """An expert's column of the weights, or the tokens among the places of what is not zero."""
    axis, index = method.value(arguments[1]), method.value(arguments[2])
    if not are_numbers((axis, index)):
        return False
    where = int(at(axis, 0)), int(at(index, 0))
    name, places = _name(method, arguments), operands(method.value(arguments[0]), _PLACES)
    if places is not None:
        if where != (1, 1):
            return False
        method.values[arguments[-1]] = Unknown(name, _WHICH, places)
        return True
    weights = weights_of(method, arguments[0])
    if not _is_route(weights) or where[0] != 2:
        return False
    expert = Constant(name, np.asarray(where[1]))
    method.values[arguments[-1]] = Unknown(name, _COLUMN, (weights, expert))
    return True


def _nonzero(method: Method, kernel: str, arguments: list[int]) -> bool:
    column = method.value(arguments[0])
    if operands(column, _COLUMN) is None:
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _PLACES, (column,))
    return True


def _gather(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The rows of an expert's tokens: of what it reads, of their weights, or of the sum so far."""
    source, axis, which = (method.value(index) for index in arguments[:3])
    column = operands(which, _WHICH)
    if column is None or not are_numbers((axis,)) or int(at(axis, 0)) != 1:
        return False
    name, (weights, expert) = _name(method, arguments), _column(column[0])
    made: Value = ChosenTokens(name, source, weights, expert)
    if source is column[0]:
        made = Unknown(name, _FACTOR, column)
    elif isinstance(source, Combine) or operands(source, _NOTHING) is not None:
        made = Unknown(name, _OLD, (source, column[0]))
    method.values[arguments[-1]] = made
    return True


def _column(column: Value) -> tuple[Value, int]:
    """The weights of which a value is a column, and the column's number."""
    found = operands(column, _COLUMN)
    assert found is not None
    return found[0], int(at(found[1], 0))


def _put(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``total[:, which] = total[:, which] + result * weights``: one more term of the sum."""
    total, (places, new, accumulate) = arguments[0], arguments[1:4]
    listed, added, adds = method.records[places], method.value(new), method.value(accumulate)
    if total != arguments[-1] or listed.table != "OptionalTensorList" or bool(at(adds, 0)):
        return False
    absent, *where = listed["items"]
    column = operands(method.value(where[0]), _WHICH) if absent == -1 and len(where) == 1 else None
    result = None if column is None else _result(added, method.value(total), column[0])
    if column is None or result is None:
        return False
    weights, expert = _column(column[0])
    if method.guard not in (None, (weights, expert)):
        return False
    terms: tuple[tuple[int, Value], ...] = ()
    before = method.value(total)
    if isinstance(before, Combine):
        if before.weights is not weights:
            return False
        terms = before.terms
    name = _name(method, arguments)
    method.values[total] = Combine(name, weights, (*terms, (expert, result)))
    return True


def _result(added: Value, total: Value, column: Value) -> Value | None:
    """``result`` of ``old + result * factor``, of an expert's tokens; None for another value."""
    if not isinstance(added, Sum) or not isinstance(added.terms[1], Product):
        return None
    old = operands(added.terms[0], _OLD)
    result, factor = added.terms[1].factors
    of = operands(factor, _FACTOR)
    if old is None or of is None or old[0] is not total:
        return None
    return result if old[1] is column and of[0] is column else None


MIXTURE_KERNELS: Final[Mapping[str, Callable[[Method, str, list[int]], bool]]] = {
    **dict.fromkeys(
        (
            "aten::argmax",
            "aten::scatter",
            "aten::gather",
            "aten::eq",
            "aten::_softmax",
            "aten::abs",
            "aten::sub",
            "aten::maximum",
            "aten::div",
        ),
        sampled_kernel,
    ),
    "aten::amax": _largest,
    "aten::gt": _greater,
    "aten::full_like": _zeros,
    "aten::select_copy": _select,
    "aten::nonzero": _nonzero,
    "aten::index_select": _gather,
    "aten::index_put_": _put,
}
