"""Lifts a mixture's experts: which tokens each takes, its delegate, and the sum of the results.

It reads what `exporters.executorch.mixtures` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from exporters.executorch.lifted_method import Guard, Method
from exporters.executorch.lifted_routes import is_choice, sampled_kernel, weights_of
from exporters.executorch.lifted_slots import (
    OwnRows,
    chosen_slots,
    filled,
    flat_weights,
    has_rows,
    is_zeros,
    own_rows,
    rows_of_expert,
)
from exporters.executorch.lifted_values import operands
from exporters.lifted import Constant, Product, Sum, Unknown, Value, at
from exporters.lifted_mixture import ChosenTokens, Combine

_LARGEST: Final = "largest weight of each expert"
_NOTHING: Final = "zeros"
_COLUMN: Final = "weights of an expert"
_PLACES: Final = "places of an expert's weights"
_WHICH: Final = "tokens of an expert"
_FACTOR: Final = "weights of an expert's tokens"
_OLD: Final = "sums of an expert's tokens"


def _name(method: Method, arguments: list[int]) -> str:
    return f"{method.name}, value {arguments[-1]}"


def _largest(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``amax(weights, [0, 1])``."""
    weights, axes = weights_of(method, arguments[0]), method.records[arguments[1]]
    if not is_choice(weights) or axes.table != "IntList":
        return False
    if method.constants(*axes["items"], arguments[2]) != (0, 1, False):
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _LARGEST, (weights,))
    return True


def _greater(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Which experts any token chose, ``largest > 0``; or a step of a choice of experts."""
    largest, out = operands(method.value(arguments[0]), _LARGEST), arguments[-1]
    if largest is None:
        return sampled_kernel(method, kernel, arguments)
    if method.constants(arguments[1]) != (0,):
        return False
    method.values[out] = made = Unknown(_name(method, arguments), "chosen experts", largest)
    method.guards = Guard(out, made, method.sizes(out)[0], largest[0])
    return True


def _zeros(method: Method, kernel: str, arguments: list[int]) -> bool:
    """What results are added to; or a step of a choice of experts."""
    if id(method.value(arguments[0])) in method.samples:
        return sampled_kernel(method, kernel, arguments)
    if method.constants(arguments[1]) != (0,):
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _NOTHING)
    return True


def _select(method: Method, kernel: str, arguments: list[int]) -> bool:
    """An expert's column of the weights, or the tokens among the places of what is not zero."""
    where = method.constants(*arguments[1:3])
    if where is None:
        return False
    name, places = _name(method, arguments), operands(method.value(arguments[0]), _PLACES)
    if places is not None:
        if where != (1, 1):
            return False
        method.values[arguments[-1]] = Unknown(name, _WHICH, places)
        return True
    weights = weights_of(method, arguments[0])
    made = rows_of_expert(name, weights, *where)
    if is_choice(weights) and where == (0, 0):
        made = flat_weights(name, weights)
    elif is_choice(weights) and where[0] == 2:
        made = Unknown(name, _COLUMN, (weights, Constant(name, np.asarray(where[1]))))
    if made is None:
        return False
    method.values[arguments[-1]] = made
    return True


def _nonzero(method: Method, kernel: str, arguments: list[int]) -> bool:
    column = method.value(arguments[0])
    if operands(column, _COLUMN) is None:
        return False
    method.values[arguments[-1]] = Unknown(_name(method, arguments), _PLACES, (column,))
    return True


def _gather(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The rows of an expert's tokens: of what it reads, of their weights, or of the sum so far.

    Of a mixture of heads, also the numbers of their slots' rows, and these rows.
    """
    source, which = (method.value(arguments[index]) for index in (0, 2))
    axis, name = method.constants(arguments[1]), _name(method, arguments)
    column = operands(which, _WHICH)
    made: Value | None = None
    if axis == (0,):
        made = None if column is None else own_rows(name, source, *_column(column[0]))
    elif axis != (1,):
        return False
    elif isinstance(which, OwnRows):
        made = chosen_slots(method, name, source, which)
    elif column is not None:
        made = _tokens_rows(name, source, column[0])
    if made is None:
        return False
    method.values[arguments[-1]] = made
    return True


def _tokens_rows(name: str, source: Value, column: Value) -> Value:
    """The rows of the tokens that chose an expert."""
    if source is column:
        return Unknown(name, _FACTOR, (column,))
    if isinstance(source, Combine) or _is_nothing(source):
        return Unknown(name, _OLD, (source, column))
    return ChosenTokens(name, source, *_column(column))


def _is_nothing(value: Value) -> bool:
    return operands(value, _NOTHING) is not None or is_zeros(value)


def _column(column: Value) -> tuple[Value, int]:
    """The weights of which a value is a column, and the column's number."""
    found = operands(column, _COLUMN)
    assert found is not None
    return found[0], int(at(found[1], 0))


def _put(method: Method, kernel: str, arguments: list[int]) -> bool:
    """One more term of a sum, or an expert's results in its own slots.

    ``total[:, which] = total[:, which] + result * weights`` or ``slots[:, own] = result``.
    """
    total, (places, new, accumulate) = arguments[0], arguments[1:4]
    listed, adds = method.records[places], method.constants(accumulate)
    if total != arguments[-1] or listed.table != "OptionalTensorList" or adds != (False,):
        return False
    absent, *where = listed["items"]
    if absent != -1 or len(where) != 1:
        return False
    own, before, added = method.value(where[0]), method.value(total), method.value(new)
    name, column = _name(method, arguments), operands(own, _WHICH)
    made: Value | None = None
    if isinstance(own, OwnRows):
        if method.guard in (None, (own.weights, own.expert)):
            made = filled(method, name, before, own, added)
    elif column is not None and method.guard in (None, _column(column[0])):
        made = _added(method, name, before, added, column[0])
    if made is None:
        return False
    method.values[total] = made
    return True


def _added(method: Method, name: str, before: Value, added: Value, column: Value) -> Combine | None:
    """A sum with an expert's term; None where it is no sum or is of another router."""
    weights, expert = _column(column)
    result = _result(added, before, column)
    if result is None:
        return None
    if isinstance(before, Combine):
        same = before.weights is weights
        return Combine(name, weights, (*before.terms, (expert, result))) if same else None
    if is_zeros(before) and not has_rows(method, before, weights, 1):
        return None
    return Combine(name, weights, ((expert, result),))


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
