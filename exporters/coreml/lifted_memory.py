"""Recognises the form in which `exporters.coreml.memory` keeps a memory in two float16 states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.coreml.lifted_values import Held, Walk, cache_label, number, whole_numbers
from exporters.coreml.memory import FINER, UNIT
from exporters.coreml.names import UPDATED
from exporters.lifted import Numbers, Scaled, Sum, Value

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


@dataclass(frozen=True, eq=False)
class Remembered(Value):
    """A memory before a call, or zeros.

    Attributes:
        state: the two states' name as one, ``3.memory``.
        ignored: whether there are zeros, for each probe.
    """

    state: str
    ignored: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Rest(Value):
    """What float16 rounds away of a value."""

    whole: Value


@dataclass(frozen=True, eq=False)
class Padded(Value):
    """A value with zeros behind it.

    Attributes:
        source: the value.
        shape: its shape without them.
    """

    source: Value
    shape: tuple[int | None, ...]


def select(walk: Walk, name: str, given: Given) -> Made:
    """What two states hold where a condition is true, zeros elsewhere.

    Given::

        select(continues, (high + low / FINER) * UNIT, 0)
    """
    condition, memory, other = (given[key][0] for key in ("cond", "a", "b"))
    if not isinstance(condition, Numbers) or number(other) != 0:
        return None
    if any(array.size != 1 for array in condition.arrays):
        return None
    if not isinstance(memory, Scaled) or memory.factor != UNIT:
        return None
    parts = memory.source.terms if isinstance(memory.source, Sum) else ()
    if len(parts) != 2 or not isinstance(parts[1], Scaled) or parts[1].factor != 1 / FINER:
        return None
    high, low = parts[0], parts[1].source
    if not isinstance(high, Held) or not isinstance(low, Held):
        return None
    ignored = tuple(not array.any() for array in condition.arrays)
    return (Remembered(name, state_of(high.cache, low.cache), ignored),)


def state_of(high: str, low: str) -> str:
    """The name of two states as one.

    >>> state_of("memoryHigh_3", "memoryLow_3"), state_of("memoryHigh_3", "memoryLow_4")
    ('3.memory', 'memoryHigh_3 and memoryLow_4')
    """
    high, low = high.removesuffix(UPDATED), low.removesuffix(UPDATED)
    paired = high.replace("High", "Low") == low and high != low
    return cache_label(high) if paired else f"{high} and {low}"


def rest(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """A value minus itself as float16."""
    if given["x"][0] is not given["y"][0]:
        return None
    back = str(operation.inputs["y"].arguments[0].name)
    dtypes = walk.operations.dtypes
    rounded = dtypes.get(walk.cast_from.get(back, "")) == "fp16"
    return (Rest(name, given["x"][0]),) if rounded and dtypes.get(name) == "fp32" else None


def padded(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    """A memory's part with zeros behind its rows and columns."""
    widths, source = whole_numbers(given["pad"][0]), given["x"][0]
    if widths is None or len(widths) != 8 or any(widths[::2]) or number(given["constant_val"][0]):
        return None
    if not isinstance(source, Scaled) or source.factor not in (1 / UNIT, FINER):
        return None
    shape = walk.operations.shapes.get(str(operation.inputs["x"].arguments[0].name), ())
    return (Padded(name, source, shape),)


def cut(given: Given) -> Made:
    """A padded value without its padding."""
    source, end = given["x"][0], whole_numbers(given["end"][0])
    assert isinstance(source, Padded)
    begin = whole_numbers(given["begin"][0])
    whole = begin is not None and not any(begin) and end == source.shape
    return (source.source,) if whole else None


def noted(walk: Walk, written: str, value: Value) -> tuple[Value, str] | None:
    """Notes what a state or an output gets; returns a memory when its second part is written.

    Returns:
        The memory after the call, and the two states' name as one.
    """
    if written not in walk.states and written not in walk.operations.outputs:
        return None
    source = value.source if isinstance(value, Padded) else value
    if not isinstance(source, Scaled):
        return None
    walk.highs.setdefault(id(source), written)
    if source.factor != FINER or not isinstance(source.source, Rest):
        return None
    whole = source.source.whole
    if not isinstance(whole, Scaled) or whole.factor != 1 / UNIT or id(whole) not in walk.highs:
        return None
    return whole.source, state_of(walk.highs[id(whole)], written)
