"""Lifts recurrences: a memory that begins with zeros, and a loop over tokens around a delegate.

It reads what `exporters.executorch.recurrence` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted_graph import Delegate
from exporters.executorch.lifted_method import Begun, Kernels, Method
from exporters.executorch.lifted_values import Part, operands
from exporters.lifted import (
    Array,
    Constant,
    Numbers,
    Product,
    Recent,
    Sum,
    Value,
    are_numbers,
    at,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    Recurrence,
)

_BATCHED: Final = "XNNBatchMatrixMultiply"
_ROOM: Final = "room for the rows of all tokens"


@dataclass(frozen=True, eq=False)
class _Row(Value):
    """One token's part of a value."""

    source: Value


def _fill(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Zeros in a memory, written only where a jump lets a text's first call through."""
    memory, number, result = arguments[0], method.value(arguments[1]), arguments[-1]
    if method.at_start is None or memory != result or not are_numbers((number,)):
        return False
    if float(at(number, 0)) != 0 or memory in method.values:
        return False
    name = f"memory at byte {method.offset(memory)} of the arena"
    ignored = tuple(bool(array.all()) for array in method.at_start.arrays)
    method.values[memory] = Begun(name, ignored)
    return True


def _room(method: Method, kernel: str, arguments: list[int]) -> bool:
    """A tensor with a row for each token, without content."""
    listed = method.records[arguments[0]]
    if listed.table != "IntList":
        return False
    rows, *others = (method.value(item) for item in listed["items"])
    if not _counts(method, rows) or not are_numbers(tuple(others)):
        return False
    method.values[arguments[-1]] = Numbers(_ROOM, tuple(np.empty(0) for _ in method.probes))
    return tuple(int(at(each, 0)) for each in others) == method.sizes(arguments[-1])[1:]


def _view(method: Method, kernel: str, arguments: list[int]) -> bool:
    method.values[arguments[-1]] = method.value(arguments[0])
    return True


def _counts(method: Method, value: Value) -> bool:
    """Whether a value is the number of a call's tokens."""
    if not isinstance(value, Numbers):
        return False
    return [int(at(value, i)) for i in range(len(method.probes))] == [
        probe.count for probe in method.probes
    ]


RECURRENCE_KERNELS: Final[Kernels] = {
    "aten::fill": _fill,
    "aten::empty": _room,
    "executorch_prim::et_view": _view,
}


def lift_loop(method: Method, calls: Sequence[Record]) -> str | None:
    """Lifts the calls of a loop, the jump back among them.

    Returns:
        What of them is otherwise than the lowering writes it; None where all is lifted.
    """
    loop = _Loop.of(method, calls)
    if loop is None:
        return "a loop that is none over tokens"
    found = _recurrence(method, loop)
    if found is None:
        return "a loop over tokens that computes no recurrence"
    method.values[loop.result] = found
    return None


@dataclass(frozen=True)
class _Loop:
    """The calls of a loop over tokens.

    Attributes:
        rows: what is selected of each token, by the number of the tensor that gets it.
        delegate: the call of the delegate.
        new: the tensor that becomes the token's row of the result.
        result: the tensor of all rows.
    """

    rows: Mapping[int, Value]
    delegate: Record
    new: int
    result: int

    @classmethod
    def of(cls, method: Method, calls: Sequence[Record]) -> _Loop | None:
        """The loop that calls are: those of one token, one more, and the comparison."""
        *selects, delegate, copy, add, equal, jump = calls
        kernels = [_kernel(method, call) for call in (*selects, copy, add, equal)]
        names, given = [name for name, _ in kernels], [arguments for _, arguments in kernels]
        wanted = ["aten::select_copy"] * len(selects)
        wanted += ["executorch_prim::et_copy_index", "executorch_prim::add", "executorch_prim::eq"]
        if names != wanted or delegate.table != "DelegateCall":
            return None
        *selected, (result, new, token), (before, step, after), (reached, count, done) = given
        if {before, after, reached} != {token} or done != jump["cond_value_index"]:
            return None
        if not (_is(method, token, 0) and _is(method, step, 1)):
            return None
        room = method.value(result)
        if not _counts(method, method.value(count)) or room.name != _ROOM:
            return None
        rows: dict[int, Value] = {}
        for source, axis, index, *out in selected:
            whole, row = method.sizes(source), method.sizes(out[0])
            if not _is(method, axis, 0) or index != token or whole[1:] != row:
                return None
            rows[out[0]] = _Row(f"{method.name}, value {out[0]}", method.value(source))
        return cls(rows, delegate, new, result)


def _kernel(method: Method, call: Record) -> tuple[str, list[int]]:
    if call.table != "KernelCall":
        return call.table, []
    operator = method.plan["operators"][call["op_index"]]
    return str(operator["name"]), list(call["args"])


def _is(method: Method, index: int, number: int) -> bool:
    """Whether a value is a whole number, at every probe."""
    value = method.value(index)
    if not isinstance(value, Constant | Numbers):
        return False
    return all(int(at(value, i)) == number for i in range(len(method.probes)))


def _recurrence(method: Method, loop: _Loop) -> Recurrence | None:
    """What the delegate of each token computes, for all tokens."""
    given = list(loop.delegate["args"])
    memory, *outputs = given[len(loop.rows) :]
    begun = method.value(memory)
    graph = method.graph_of(loop.delegate)
    if graph is None or given[: len(loop.rows)] != list(loop.rows):
        return None
    if outputs != [memory, loop.new] or not isinstance(begun, Begun):
        return None
    name = f"{method.name}, value {loop.result}"
    found = Delegate(graph, method.files, name).run([*loop.rows.values(), begun])
    shapes = {id(row): method.sizes(index) for index, row in loop.rows.items()}
    return _Step(begun, shapes, method.sizes(memory)).lift(name, *found)


@dataclass(frozen=True)
class _Step:
    """One token's step.

    Attributes:
        memory: the memory before the token.
        shapes: the shape of each row, by its id.
        dims: the shape of the memory: heads, rows, columns.
    """

    memory: Begun
    shapes: Mapping[int, tuple[int, ...]]
    dims: tuple[int, ...]

    def lift(self, name: str, new: Value, result: Value) -> Recurrence | None:
        """The recurrence whose memory and result these are; None for another step.

        ``new`` is ``exp(decay) * memory + key * value``, where a value that replaces is
        ``(value - key @ (exp(decay) * memory)) * beta``.
        """
        if not (isinstance(new, Sum) and isinstance(new.terms[1], Product)):
            return None
        kept, (key, value) = new.terms[0], new.terms[1].factors
        decay, beta = self._decay(kept), None
        replaced = self._replaced(value, key, kept)
        if replaced is not None:
            value, beta = replaced
        bonus = None
        query = _product_of(result, new)
        if query is None:
            own = self._read_before(result, key, value)
            if own is None or beta is not None:
                return None
            query, bonus = own
        parts = [_row(each) for each in (query, key, value)]
        dimensions = self._dimensions(parts)
        if decay is None or dimensions is None:
            return None
        q, k, v = (part.source for part in parts if part is not None)
        recent = Recent(self.memory.name, self.memory.name, self.memory.ignored)
        shape = dimensions[0], dimensions[2]
        of, decays = (decay.weight, decay.values) if isinstance(decay, Part) else (decay, None)
        weight, bonuses = (None, None) if bonus is None else (bonus.weight, bonus.values)
        tables = [None if each is None else each.reshape(shape) for each in (decays, bonuses)]
        return Recurrence(name, q, k, v, of, tables[0], weight, tables[1], beta, dimensions, recent)

    def _decay(self, kept: Value) -> Value | None:
        """The decay of ``memory * exp(decay)``."""
        if not isinstance(kept, Product) or kept.factors[0] is not self.memory:
            return None
        power = kept.factors[1]
        if not (isinstance(power, Function) and power.function == "exp"):
            return None
        heads, rows, _ = self.dims
        if isinstance(power.source, Part):
            values = power.source.values
            return power.source if values is not None and values.size == heads * rows else None
        decay = _row(power.source)
        if decay is None or self.shapes[id(decay)] not in ((heads, 1, 1), (heads, rows, 1)):
            return None
        return decay.source

    def _replaced(self, value: Value, key: Value, kept: Value) -> tuple[Value, Value] | None:
        """The value and beta of ``(value - key @ kept) * beta``; None for another value."""
        if not isinstance(value, Product):
            return None
        pair, beta = operands(value.factors[0], "difference"), _row(value.factors[1])
        if pair is None or beta is None or _product_of(pair[1], kept) is not key:
            return None
        return (pair[0], beta.source) if self.shapes[id(beta)] == (self.dims[0], 1, 1) else None

    def _read_before(self, result: Value, key: Value, value: Value) -> tuple[Value, Gain] | None:
        """The query and bonus of ``query @ memory + value * sum(query * bonus * key)``."""
        if not (isinstance(result, Sum) and isinstance(result.terms[1], Product)):
            return None
        query, (first, own) = _product_of(result.terms[0], self.memory), result.terms[1].factors
        inside = operands(own, "sum")
        if query is None or first is not value or inside is None:
            return None
        if not isinstance(inside[0], Product):
            return None
        bonus, again = inside[0].factors
        if again is not key or not isinstance(bonus, Gain) or bonus.source is not query:
            return None
        return query, bonus

    def _dimensions(self, parts: Sequence[_Row | None]) -> tuple[int, int, int, int] | None:
        """Heads, heads of queries and keys, rows and columns, where the operands agree."""
        shapes = [() if part is None else self.shapes[id(part)] for part in parts]
        heads, rows, columns = self.dims
        groups = shapes[0][0] if shapes[0] else 0
        wanted = [(groups, 1, rows), (groups, rows, 1), (heads, 1, columns)]
        agree = shapes == wanted and groups > 0 and heads % groups == 0
        return (heads, groups, rows, columns) if agree else None


def _product_of(value: Value, second: Value) -> Value | None:
    """``first`` of ``first @ second``; None for another value."""
    pair = operands(value, _BATCHED)
    return pair[0] if pair is not None and pair[1] is second else None


def _row(value: Value) -> _Row | None:
    """The row of a token that a value is, or that is repeated for the heads of a group."""
    if isinstance(value, Product) and isinstance(value.factors[1], Constant):
        ones: Array = value.factors[1].array
        value = value.factors[0] if np.all(ones == 1) else value
    return value if isinstance(value, _Row) else None
