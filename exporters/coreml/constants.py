"""Reads the constants of a MIL program, from the program itself or from its weight files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from exporters.coreml.blob_file import BITS, Blob
from exporters.coreml.package import Package, TensorType, tensor_type
from exporters.errors import ExportError

# NumPy's types for elements of a byte or more. NumPy has no bf16 and no 8-bit floats, so those are
# read as unsigned integers that hold their bits.
_NUMPY: Final[dict[str, str]] = {
    "bool": "?",
    "fp16": "<f2",
    "fp32": "<f4",
    "fp64": "<f8",
    "bf16": "<u2",
    "int8": "i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "fp8e4m3fn": "u1",
    "fp8e5m2": "u1",
}
_FIELDS: Final = {
    "floats": "fp32",
    "doubles": "fp64",
    "ints": "int32",
    "longInts": "int64",
    "bools": "bool",
}


@dataclass(frozen=True)
class Constant:
    """A constant, whose elements are not unpacked or converted.

    Attributes:
        dtype: MIL's name of the element type.
        shape: the constant's dimensions.
        data: for elements of a byte or more, an array of that shape (bf16 and 8-bit floats as
            their bits); for smaller elements, the packed bytes, low bits first.
        blob: where a weight file holds the data; None where no file does.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]
    blob: Blob | None = None

    @property
    def bits(self) -> int:
        """The number of bits of one element."""
        return BITS[self.dtype]

    @property
    def elements(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yields the data's bytes, at most ``size`` at a time; none of a file's stays resident."""
        if self.blob is not None:
            yield from self.blob.blocks(size)
            return
        flat = np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)
        for start in range(0, len(flat), size):
            yield flat[start : start + size].tobytes()

    def codes(self) -> npt.NDArray[Any]:
        """The elements in their shape; those of less than a byte are unpacked to (u)int8."""
        if self.bits >= 8:
            return self.data
        values = unpack_bits(self.data, self.bits, self.elements)
        if self.dtype == "int4":
            values = ((values ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.int8)
        return values.reshape(self.shape)


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Unpacks elements of 1 to 8 bits, packed low bits first, to uint8 ``[count]``.

    >>> unpack_bits(np.array([0b1110_0100], np.uint8), 2, 4).tolist()
    [0, 1, 2, 3]
    >>> unpack_bits(np.array([0b1000_1000, 0b1], np.uint8), 3, 3).tolist()
    [0, 1, 6]
    """
    if bits == 8:
        return packed[:count]
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        spread = (packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)
        return spread.reshape(-1)[:count]
    # 3 and 6 bits: eight elements fill three and six bytes.
    groups = -(-count // 8)
    whole = np.zeros(groups * bits, np.uint8)
    taken = packed[: len(whole)]
    whole[: len(taken)] = taken
    words = np.zeros(groups, np.uint64)
    for index in range(bits):
        words |= whole[index::bits].astype(np.uint64) << np.uint64(8 * index)
    spread = np.empty((groups, 8), np.uint8)
    for index in range(8):
        spread[:, index] = (words >> np.uint64(bits * index)) & np.uint64((1 << bits) - 1)
    return spread.reshape(-1)[:count]


def read_text(value: Any) -> str | None:
    """The string that a ``Value`` message itself holds, or None when it holds no single string."""
    tensor = value.immediateValue.tensor
    if tensor.WhichOneof("value") != "strings" or len(tensor.strings.values) != 1:
        return None
    return str(tensor.strings.values[0])


def read_constant(package: Package, value: Any, where: str) -> Constant:
    """Reads the tensor that a ``Value`` message holds.

    Args:
        package: the package, whose weight files may hold the tensor's bytes.
        value: the message.
        where: which constant it is, for the error.

    Raises:
        ExportError: it is not a tensor of fixed shape, or the number of its elements is not the
            one that its type states.
    """
    kind = tensor_type(value.type, where)
    if None in kind.shape:
        raise ExportError(
            f"{where} is a constant without a fixed shape, {kind}: the package was changed"
        )
    if value.WhichOneof("value") == "blobFileValue":
        return _from_file(package, value.blobFileValue, kind, where)
    if value.WhichOneof("value") != "immediateValue":
        raise ExportError(f"{where} is a constant without a value: the package was changed")
    immediate = value.immediateValue
    if immediate.WhichOneof("value") != "tensor":
        raise ExportError(f"{where} is a {immediate.WhichOneof('value')}; only tensors can be read")
    return _in_place(package, immediate.tensor, kind, where)


def _from_file(package: Package, named: Any, kind: TensorType, where: str) -> Constant:
    blob = package.blob_file(named.fileName).read(named.offset)
    stored = "uint8" if kind.dtype == "bool" else kind.dtype
    if blob.dtype != stored:
        raise ExportError(
            f"{where} is {kind}, but the weight file holds {blob.dtype} at its offset "
            f"{named.offset}: the package was changed"
        )
    if blob.elements != kind.elements:
        raise ExportError(
            f"{where} is {kind}, {kind.elements} elements, but the weight file holds "
            f"{blob.elements} at its offset {named.offset}: the package was changed"
        )
    return _constant(kind, blob.data, blob)


def _in_place(package: Package, tensor: Any, kind: TensorType, where: str) -> Constant:
    written = tensor.WhichOneof("value")
    if written == "bytes":
        data = np.frombuffer(tensor.bytes.values, np.uint8)
        wanted = -(-kind.elements * BITS.get(kind.dtype, 8) // 8)
        if len(data) != wanted:
            raise ExportError(
                f"{where} is {kind}, {wanted} bytes, but {len(data)} are written: the package was "
                f"changed"
            )
        return _constant(kind, data)
    if written not in _FIELDS:
        raise ExportError(f"{where} holds {written or 'nothing'}, where {kind} is needed")
    values = np.array(getattr(tensor, written).values, _NUMPY[_FIELDS[written]])
    if kind.dtype in _NUMPY and values.size == 1 < kind.elements:
        # One value may stand for a whole tensor.
        package.expand(kind.elements, where)
        values = np.full(kind.elements, values[0], _NUMPY[kind.dtype])
    if values.size != kind.elements or kind.dtype not in _NUMPY:
        raise ExportError(
            f"{where} is {kind}, {kind.elements} elements, but {values.size} are written: the "
            f"package was changed"
        )
    shape = tuple(dim or 0 for dim in kind.shape)
    return Constant(kind.dtype, shape, values.astype(_NUMPY[kind.dtype]).reshape(shape))


def _constant(kind: TensorType, data: npt.NDArray[np.uint8], blob: Blob | None = None) -> Constant:
    shape = tuple(dim or 0 for dim in kind.shape)
    if BITS[kind.dtype] < 8:
        return Constant(kind.dtype, shape, data, blob)
    return Constant(kind.dtype, shape, data.view(_NUMPY[kind.dtype]).reshape(shape), blob)
