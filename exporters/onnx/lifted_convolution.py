"""Lifts short convolutions and their states; see `exporters.onnx.short_conv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.lifted import (
    Constant,
    Numbers,
    Product,
    Recent,
    ShortConv,
    StoredFormat,
    StoredWeight,
    Unknown,
    Value,
    row_numbers,
)
from exporters.onnx.lifted_values import Graph, Lifted, Part

if TYPE_CHECKING:
    from onnx import NodeProto

_TURNED: Final = [0, 2, 1]
# Kinds of values on the way to a convolution: the state or zeros, the same with tokens before
# columns, it and the new tokens, the row's last tokens, and a weight's columns one below another.
_HELD, BEFORE, _ROW, LAST, _TAPS = (
    f"{part} of a convolution" for part in ("state", "tokens before", "row", "last tokens", "taps")
)
# The last tokens of several rows that one state keeps, and the row of which a shift is made.
_LASTS, ROW_OF_A_SHIFT = "last tokens of several", "row of a shift"


def where(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the choice between a state and zeros."""
    begins, zero, state = given
    is_zero = isinstance(zero, Constant) and not zero.array.any()
    if not (isinstance(begins, Numbers) and is_zero and isinstance(state, Unknown)):
        return None
    if state.kind != "input" or any(array.size != 1 for array in begins.arrays):
        return None
    return (Unknown(node.output[0], _HELD, (begins, state)),)


def transpose(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the change between columns before tokens and tokens before columns."""
    source, order = given[0], list(attributes.get("perm", []))
    if isinstance(source, Part) and source.dtype and order == [1, 0]:
        return (Unknown(node.output[0], _TAPS, (source,)),)
    if not isinstance(source, Unknown) or order != _TURNED:
        return None
    if source.kind == _HELD:
        return (Unknown(node.output[0], BEFORE, source.operands),)
    return (source,) if source.kind in (LAST, _LASTS) else None


def concat(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the row of the tokens before a call and its own, and last tokens in one state."""
    if attributes.get("axis") != 1:
        return None
    if all(isinstance(each, Unknown) and each.kind == LAST for each in given):
        return (Unknown(node.output[0], _LASTS, given),)
    if len(given) != 2:
        return None
    before = given[0]
    if not (isinstance(before, Unknown) and before.kind == BEFORE):
        return None
    return (Unknown(node.output[0], _ROW, (*before.operands, given[1])),)


def last_tokens(graph: Graph, name: str, row: Value, places: Value) -> Value | None:
    """The last tokens of a convolution's or a shift's row, which become its state."""
    is_row = isinstance(row, Unknown) and row.kind in (_ROW, ROW_OF_A_SHIFT)
    if not (is_row and isinstance(places, Numbers)):
        return None
    return Unknown(name, LAST, (row, places))


def convolution(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the sum of a row's shifted products as the convolution that it is."""
    steps = [_step(term, len(given)) for term in given]
    if not steps or any(step is None for step in steps):
        return None
    rows, parts, taps = zip(*(step for step in steps if step is not None), strict=True)
    row, part = rows[0], parts[0]
    if any(each is not row for each in rows) or taps != tuple(range(len(given))):
        return None
    values = graph.array(part.tensor).astype(np.float32)
    if any(each.weight != part.weight for each in parts) or values.shape[-1] != len(given):
        return None
    begins, state, source = row.operands
    ignored = tuple(bool(array.ravel()[0]) for array in begins.arrays)
    recent = Recent(_layer(state.name), _written(graph, row, len(given) - 1), ignored)
    weight = StoredWeight(part.weight, StoredFormat(part.dtype))
    values = values.reshape(-1, len(given))
    return (ShortConv(node.output[0], source, weight, values, recent),)


def _step(term: Value, width: int) -> tuple[Unknown, Part, int] | None:
    """The row, the weight and the place of one term: ``row[:, tap : tap + t] * weight[:, tap]``."""
    if not isinstance(term, Product):
        return None
    shifted, tap = term.factors
    of_row, of_taps = _slice(shifted, _ROW, 1), _slice(tap, _TAPS, 0)
    if of_row is None or of_taps is None:
        return None
    (row, first, stop), (taps, column, after) = of_row, of_taps
    at_end = stop >= 1 << 31 if column == width - 1 else stop == column - width + 1
    part = taps.operands[0]
    if first != column or after != column + 1 or not at_end or not isinstance(part, Part):
        return None
    return row, part, column


def _slice(value: Value, kind: str, axis: int) -> tuple[Unknown, int, int] | None:
    """What is sliced along an axis, and its bounds; None where it is not of that kind."""
    if not (isinstance(value, Unknown) and value.kind == "Slice" and len(value.operands) == 4):
        return None
    source, *numbers = value.operands
    if not (isinstance(source, Unknown) and source.kind == kind):
        return None
    if not all(isinstance(each, Constant) and each.array.size == 1 for each in numbers):
        return None
    first, stop, along = (int(each.array[0]) for each in numbers if isinstance(each, Constant))
    return (source, first, stop) if along == axis else None


def _written(graph: Graph, row: Unknown, tokens: int) -> str:
    """The state that gets a row's last tokens; what it would be where none does."""
    wanted = tuple(tuple(range(p.count, p.count + tokens)) for p in graph.probes)
    for name in graph.outputs:
        value = graph.values.get(name)
        if isinstance(value, Unknown) and value.kind == LAST and value.operands[0] is row:
            if row_numbers(value.operands[1], len(graph.probes)) == wanted:
                return _layer(name)
            return f"{_layer(name)}, of other tokens"
    return f"{row.name}, no output"


def _layer(name: str) -> str:
    """A state's name without the side on which it enters or leaves: ``3.recent``."""
    for side in ("past_key_values.", "past.", "present."):
        name = name.removeprefix(side)
    return f"{name.removesuffix('.conv').removesuffix('.conv_state')}.recent"
