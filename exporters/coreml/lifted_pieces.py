"""Lifts views, casts, slices, splits and pads: what moves numbers and computes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from exporters.coreml import (
    lifted_attention,
    lifted_convolution,
    lifted_marks,
    lifted_memory,
    lifted_recurrence,
    lifted_slots,
)
from exporters.coreml.lifted_values import Held, Walk, whole_numbers
from exporters.coreml.names import TOKENS
from exporters.lifted import Attention, Columns, Constant, Last, Value

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


def passed(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Casts and reshapes change no number; tables' rows and caches stay what they are."""
    source = given["x"][0]
    slots = isinstance(source, lifted_slots.Filled | lifted_slots.Summed)
    if slots and operation.type == "reshape":
        return lifted_slots.joined(walk, name, given, operation)
    lifted_convolution.kept(walk, name, source)
    lifted_recurrence.written(walk, name, source)
    walk.cast_from[name] = str(operation.inputs["x"].arguments[0].name)
    return (source,)


def _transpose(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    if whole_numbers(given["perm"][0]) == (1, 0):
        return lifted_convolution.turned(given)
    shape = walk.operations.shapes.get(str(operation.inputs["x"].arguments[0].name), ())
    tokens = walk.operations.shapes[TOKENS][-1]
    swapped = whole_numbers(given["perm"][0]) == (0, 2, 1, 3)
    if not swapped or shape[:1] != (1,) or tokens not in shape[1:3]:
        return None  # no heads and tokens that change places
    return given["x"][:1]


def _split(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    sizes = whole_numbers(given["split_sizes"][0])
    axis = whole_numbers(given["axis"][0])
    source = given["x"][0]
    if isinstance(source, lifted_convolution.Turned) and sizes is not None and axis == (0,):
        names = [str(output.name) for output in operation.outputs]
        return lifted_convolution.columns(names, source, sizes)
    if sizes is None or axis != (-1,):
        return None
    ends = np.cumsum(sizes).tolist()
    return tuple(
        Columns(str(output.name), given["x"][0], stop - size, stop)
        for output, size, stop in zip(operation.outputs, sizes, ends, strict=True)
    )


def _slice(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    source = given["x"][0]
    if isinstance(source, lifted_convolution.Rows):
        return lifted_convolution.shifted(walk, name, given)
    if isinstance(source, Held):  # what is behind is padding
        return (source,)
    if isinstance(source, lifted_memory.Padded):
        return lifted_memory.cut(given)
    if isinstance(source, lifted_slots.Places):
        return lifted_slots.part(walk, name, given, operation)
    if lifted_marks.has_places(source):
        return lifted_marks.part(name, given)
    begin, end = (whole_numbers(given[key][0]) for key in ("begin", "end"))
    free = [whole_numbers(given[key][0]) for key in ("begin_mask", "end_mask") if key in given]
    if len(free) < 2:
        return None
    if begin == (0, -1, 0) and free == [(1, 0, 1), (1, 1, 1)]:
        return (Last(name, lifted_convolution.previous(walk, source)),)
    whole = free[0] is not None and all(free[0]) and free[1] is not None and all(free[1][:-1])
    if end is None or not whole:
        return None
    if isinstance(source, Attention):  # the columns behind are padding
        return (source,)
    return (Columns(name, source, 0, end[-1]),)


def _concat(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    rows = lifted_convolution.joined(name, given["values"], whole_numbers(given["axis"][0]))
    return rows or lifted_attention.joined(name, given["values"])


def _pad(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """Zeros at the end of a head's columns change no product of queries and keys."""
    widths, filled = whole_numbers(given["pad"][0]), given["constant_val"][0]
    zero = isinstance(filled, Constant) and not np.any(filled.array)
    if isinstance(given["x"][0], lifted_convolution.Shifted):
        behind = widths is not None and not any(widths[::2])
        lifted_convolution.kept(walk, name, given["x"][0])
        return given["x"][:1] if behind and zero else None
    padded = lifted_memory.padded(walk, name, given, operation)
    if padded is not None:
        lifted_recurrence.written(walk, name, padded[0])
        return padded
    return given["x"][:1] if widths is not None and not any(widths[:-1]) and zero else None


PIECES: Final[Mapping[str, Callable[[Walk, str, Given, Any], Made]]] = {
    "cast": passed,
    "reshape": passed,
    "identity": passed,
    "transpose": _transpose,
    "split": _split,
    "slice_by_index": _slice,
    "concat": _concat,
    "pad": _pad,
}
"""The handlers, by operation."""
