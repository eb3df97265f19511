"""Recognises which rows the slots of a mixture of attention heads are.

It reads what `exporters.executorch.slots` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from exporters.executorch.lifted_heads import SlotRows, SlotsApart
from exporters.executorch.lifted_method import Kernels, Method
from exporters.executorch.lifted_values import operands
from exporters.executorch.method import SCALAR_TYPES
from exporters.lifted import Constant, Last, Unknown, Value, are_numbers, at
from exporters.lifted_mixture import ChosenSlots

_FLAT: Final = "weights of experts by token"
_TAKEN: Final = "whether tokens chose experts"
_COUNTS: Final = "how many experts a token chose up to each"
_ROWS: Final = "rows of slots"
_OF_EXPERT: Final = "rows of an expert's slots"
_ZEROS: Final = "rows of zeros"


@dataclass(frozen=True, eq=False)
class OwnRows(Value):
    """The rows of the slots that an expert's tokens have of it.

    Attributes:
        weights: each token's weight of each expert.
        expert: the expert's column.
        firsts: the number before the first row of each token.
    """

    weights: Value
    expert: int
    firsts: Value


def flat_weights(name: str, weights: Value) -> Value:
    """The tokens' weights without the axis of one text: ``float32[t, E]``."""
    return Unknown(name, _FLAT, (weights,))


def rows_of_expert(name: str, rows: Value, axis: int, expert: int) -> Value | None:
    """An expert's column of the row numbers; None for another value."""
    found = operands(rows, _ROWS)
    if found is None or axis != 1:
        return None
    return Unknown(name, _OF_EXPERT, (*found, Constant(name, np.asarray(expert))))


def own_rows(name: str, rows: Value, weights: Value, expert: int) -> OwnRows | None:
    """The row numbers of an expert's tokens: those of the same expert and router, else None."""
    found = operands(rows, _OF_EXPERT)
    if found is None or found[0] is not weights or int(at(found[2], 0)) != expert:
        return None
    return OwnRows(name, weights, expert, found[1])


def chosen_slots(method: Method, name: str, source: Value, own: OwnRows) -> ChosenSlots | None:
    """An expert's own slots of what attention gives for the weights' tokens; None for others."""
    if not isinstance(source, SlotsApart) or not _fit(method, own, source.chosen):
        return None
    if _positions(source.source) != _positions(own.weights):
        return None
    return ChosenSlots(name, source.source, own.weights, own.expert, source.chosen, source.heads)


def filled(method: Method, name: str, rows: Value, own: OwnRows, new: Value) -> SlotRows | None:
    """Rows of slots with an expert's results in its own; None for other rows."""
    if isinstance(rows, SlotRows):
        chosen, terms = rows.chosen, rows.terms
        if rows.weights is not own.weights:
            return None
    else:
        found, tokens = operands(rows, _ZEROS), _tokens(method, own.weights)
        chosen, terms = 0, ()
        if found is not None:
            chosen = int(at(found[0], 0)) // tokens[0]
        if chosen < 1 or not has_rows(method, rows, own.weights, chosen):
            return None
    if not _fit(method, own, chosen):
        return None
    return SlotRows(name, own.weights, (*terms, (own.expert, new)), chosen)


def is_zeros(value: Value) -> bool:
    """Whether a value is zeros in a stated shape."""
    return operands(value, _ZEROS) is not None


def has_rows(method: Method, zeros: Value, weights: Value, slots: int) -> bool:
    """Whether zeros have so many rows for each token that the weights are of."""
    found = operands(zeros, _ZEROS)
    wanted = [slots * count for count in _tokens(method, weights)]
    return found is not None and [int(at(found[0], i)) for i in range(len(method.probes))] == wanted


def _positions(value: Value) -> int | None:
    """Of how many last tokens a value is at most; None for all tokens."""
    return value.positions if isinstance(value, Last) else None


def _tokens(method: Method, weights: Value) -> list[int]:
    """How many tokens the weights are of, for each probe."""
    most = _positions(weights)
    return [probe.count if most is None else min(probe.count, most) for probe in method.probes]


def _fit(method: Method, own: OwnRows, chosen: int) -> bool:
    """Whether each token has ``chosen`` rows, those of the token before it being before them."""
    for i, count in enumerate(_tokens(method, own.weights)):
        wanted = np.arange(count)[:, None] * chosen - 1
        if not np.array_equal(at(own.firsts, i), wanted):
            return False
    return True


def _zeros(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``full([1, rows, width], 0)``."""
    sizes = method.records[arguments[0]]
    if sizes.table != "IntList" or len(sizes["items"]) != 3:
        return False
    one, count, width = sizes["items"]
    wanted, rows = (1, method.sizes(arguments[-1])[-1], 0), method.value(count)
    if method.constants(one, width, arguments[1]) != wanted or not are_numbers((rows,)):
        return False
    name = f"{method.name}, value {arguments[-1]}"
    method.values[arguments[-1]] = Unknown(name, _ZEROS, (rows,))
    return True


def _taken(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``weights != 0``."""
    weights = operands(method.value(arguments[0]), _FLAT)
    if weights is None or method.constants(arguments[1]) != (0,):
        return False
    method.values[arguments[-1]] = Unknown(f"{method.name}, value {arguments[-1]}", _TAKEN, weights)
    return True


def _counts(method: Method, kernel: str, arguments: list[int]) -> bool:
    """The sum of booleans over the experts up to each, as integers."""
    weights, int64 = operands(method.value(arguments[0]), _TAKEN), SCALAR_TYPES["int64"][0]
    if weights is None or method.constants(*arguments[1:3]) != (1, int64):
        return False
    name = f"{method.name}, value {arguments[-1]}"
    method.values[arguments[-1]] = Unknown(name, _COUNTS, weights)
    return True


def _rows(method: Method, kernel: str, arguments: list[int]) -> bool:
    """``counts + firsts``."""
    counts, firsts = (method.value(index) for index in arguments[:2])
    weights = operands(counts, _COUNTS)
    if weights is None or not are_numbers((firsts,)) or method.constants(arguments[2]) != (1,):
        return False
    name = f"{method.name}, value {arguments[-1]}"
    method.values[arguments[-1]] = Unknown(name, _ROWS, (*weights, firsts))
    return True


SLOT_KERNELS: Final[Kernels] = {
    "aten::full": _zeros,
    "aten::ne": _taken,
    "aten::cumsum": _counts,
    "aten::add": _rows,
}
