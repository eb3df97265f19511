"""The values that an ExecuTorch program's delegates and kernels have in common, once lifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from exporters.errors import ExportError
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.reader import Place, Pte
from exporters.lifted import Array, Numbers, StoredWeight, Unknown, Value, at
from quant.input_files import open_input

# Constants of so many bytes are weights under an unknown name, and are not read.
_LARGEST_CONSTANT: Final = 1 << 28
_NUMPY: Final = {
    SCALAR_TYPES["float32"][0]: np.float32,
    SCALAR_TYPES["float16"][0]: np.float16,
    SCALAR_TYPES["int64"][0]: np.int64,
}


@dataclass(frozen=True, eq=False)
class Part(Value):
    """A weight as a delegate or a kernel reads it.

    Attributes:
        weight: the weight, with the format in which the file holds it.
        group: the group of columns, for a weight that is stored as one matrix a group.
        values: the values of a vector or of a convolution; None for a matrix.
    """

    weight: StoredWeight
    group: int | None = None
    values: Array | None = None


@dataclass(frozen=True, eq=False)
class Table(Value):
    """A tensor that kernels read: codes, scales or values of a weight, by its key.

    Attributes:
        key: the name that the file states.
        scalar_type: ExecuTorch's number of the dtype.
        shape: the tensor's shape.
    """

    key: str
    scalar_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TableRows(Value):
    """Rows of a table of cosines or sines for the tokens of a call.

    Attributes:
        table: the whole table.
        rows: the rows, for each probe.
    """

    table: Array
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Rounded(Value):
    """Activations that are rounded to 8 bits, with a step and a zero point for each token."""

    source: Value


@dataclass(frozen=True, eq=False)
class Grouped(Value):
    """The product with some groups of a weight's columns.

    Attributes:
        source: the activations, of all columns.
        weight: the weight.
        size: the columns of a group.
        groups: which groups.
    """

    source: Value
    weight: StoredWeight
    size: int
    groups: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Held(Value):
    """A cache.

    Attributes:
        length: how many tokens it holds.
    """

    length: int


@dataclass(frozen=True, eq=False)
class Updated(Value):
    """A cache with the rows of new tokens, or a slice of it.

    Attributes:
        old: the cache.
        new: the new rows.
        rows: where they are, for each probe.
        first: the first token of the slice, for each probe.
        tokens: how many tokens the slice has, for each probe.
    """

    old: Held
    new: Value
    rows: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LastRows(Numbers):
    """The last rows of a mask.

    Attributes:
        source: the whole mask.
        tokens: how many rows there are, where the mask has as many.
    """

    source: Numbers
    tokens: int


@dataclass(frozen=True, eq=False)
class Repeated(Numbers):
    """A mask several times, one below the other.

    Attributes:
        source: the mask.
        times: how often.
    """

    source: Numbers
    times: int


@dataclass(frozen=True, eq=False)
class Recalled(Value):
    """The tokens before a call's that a convolution reads.

    Attributes:
        state: the name of the state that holds them.
        ignored: for each probe, whether they are zeros instead.
        tokens: how many there are.
    """

    state: str
    ignored: tuple[bool, ...]
    tokens: int


@dataclass(frozen=True, eq=False)
class Joined(Value):
    """A call's tokens behind those before it.

    Attributes:
        before: the tokens before.
        source: the call's.
        written: the name of the state that gets the last of both; empty where none does.
    """

    before: Recalled
    source: Value
    written: str


class Files:
    """Reads constants of a program, each place once.

    Args:
        pte: the program.
    """

    def __init__(self, pte: Pte) -> None:
        self.pte, self.named = pte, pte.named()
        self._read: dict[tuple[object, ...], Array] = {}

    def array(self, place: Place, dtype: type, shape: tuple[int, ...]) -> Array:
        """An array in a file.

        Raises:
            ExportError: it is too large to be anything but a weight.
        """
        key = (*place, dtype, shape)
        if key not in self._read:
            file, offset, nbytes = place
            if nbytes > _LARGEST_CONSTANT:
                raise ExportError(f"{file} has a constant of {nbytes} bytes at {offset}")
            with open_input(file) as stream:
                stream.seek(offset)
                data = stream.read(nbytes)
            self._read[key] = np.frombuffer(data, dtype).reshape(shape)
        return self._read[key]

    def constant(self, tensor: Any) -> Array | None:
        """The array of a constant tensor; None for a dtype that no table has."""
        dtype = _NUMPY.get(tensor["scalar_type"])
        shape = tuple(tensor["sizes"])
        where, index = self.pte.program["constant_segment"], tensor["data_buffer_idx"]
        if dtype is None or not index:
            return None
        begin, total = self.pte.segments[where["segment_index"]]
        offset = where["offsets"][index]
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if offset + nbytes > total:
            raise LookupError(f"constant {index} lies past its segment")
        return self.array((self.pte.file, begin + offset, nbytes), dtype, shape)


def operands(value: Value, kind: str) -> tuple[Value, ...] | None:
    """The operands of an operation of this kind; None for any other value."""
    return value.operands if isinstance(value, Unknown) and value.kind == kind else None


def _slice(source: Array, axis: Array, start: Array, end: Array, step: Array) -> Array:
    where = [slice(None)] * source.ndim
    where[int(axis)] = slice(int(start), int(end), int(step))
    return source[tuple(where)]


NUMBERS: Final[Mapping[str, Callable[..., Array]]] = {
    "executorch_prim::add": np.add,
    "executorch_prim::eq": np.equal,
    "executorch_prim::mul": np.multiply,
    "executorch_prim::sub": np.subtract,
    "executorch_prim::sym_max": np.maximum,
    "aten::sub": lambda x, y, alpha: x - alpha * y,
    "aten::ge": np.greater_equal,
    "aten::gt": np.greater,
    "aten::lt": np.less,
    "aten::logical_and": np.logical_and,
    "aten::where": np.where,
    "aten::_local_scalar_dense": lambda x: x.reshape(()),
    "aten::slice_copy": _slice,
}
"""Kernels on numbers and masks, by name: what each makes of its operands."""


def numbers(name: str, kernel: str, given: tuple[Value, ...], probes: int) -> Numbers:
    """Computes a kernel of `NUMBERS` for each probe."""
    compute = NUMBERS[kernel]
    arrays = (compute(*(at(value, i) for value in given)) for i in range(probes))
    return Numbers(name, tuple(np.asarray(array) for array in arrays))
