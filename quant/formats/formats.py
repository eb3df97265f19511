"""Weight formats: how a matrix of weights is stored, and what its stored parts are.

A format knows the dtypes and shapes of its parts and refuses matrices that it cannot hold; it holds
no weights itself. Codes are unsigned in every integer format: ``value = (code - zero_point) *
scale``, where a symmetric format has the implicit zero point ``2 ** (bits - 1)``. In a palette
format ``value = lut[group, code]``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from quant.errors import FormatRefused, QuantizationError
from quant.suggestion import nearest

FloatName = Literal["float32", "float16", "bfloat16"]
ScaleName = Literal["bfloat16", "float16"]
IntBits = Literal[2, 3, 4, 5, 6, 7, 8]

_ITEM_BYTES: Final = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_FLOAT_NAMES: Final[dict[FloatName, str]] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}
_PALETTE_BITS: Final = (2, 3, 4, 6, 8)
_INT_BITS: Final[tuple[IntBits, ...]] = (2, 3, 4, 5, 6, 7, 8)
_INT_NAME: Final = re.compile(r"int([2-8])-(pc|g([1-9][0-9]*))(-asym)?(-f16)?")
_PALETTE_NAME: Final = re.compile(r"lut([2-8])-(pt|gc([1-9][0-9]*))")
_USUAL_NAMES: Final = (
    *(
        f"int{bits}-{groups}{zero}"
        for bits in _INT_BITS
        for groups in ("g32", "g64", "g128", "pc")
        for zero in ("", "-asym")
    ),
    *(f"lut{bits}-{groups}" for bits in _PALETTE_BITS for groups in ("pt", "gc8", "gc16", "gc32")),
    *_FLOAT_NAMES.values(),
)


@dataclass(frozen=True)
class TensorLayout:
    """Dtype and shape of one stored part.

    Attributes:
        dtype: Name of the element type, as torch spells it: ``uint8``, ``bfloat16``, ...
        shape: Sizes of the dimensions, row major.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class IntFormat:
    """Integers of 2 to 8 bits with one scale per group of columns.

    A symmetric format of 2 bits has the steps -2, -1, 0 and 1: with a positive scale the unpaired
    step always lies on the negative side. On normal weights in groups of 32 that leaves a relative
    error of 0.37 at 2.5 bits a weight; scales of either sign (`quant.quantizers.rtn_signed`) leave
    0.33 at the same size, and zero points 0.33 at 2.56 bits. So at 2 bits take ``rtn-signed`` or
    ``gptq-signed`` where the runtime accepts negative scales, as ONNX does, and zero points
    elsewhere and with AWQ. At 3 bits the errors are 0.178, 0.162 and 0.160.

    Attributes:
        bits: 2 to 8; a group's codes fill whole bytes.
        group_size: Columns that share a scale, or None for one group per row ("per channel").
        symmetric: Whether the zero point is the implicit ``2 ** (bits - 1)``; otherwise every group
            has its own zero point in ``0 .. 2 ** bits - 1``.
        scale_dtype: ``bfloat16``, which every runtime accepts; ``float16`` only where a checkpoint
            that was quantized elsewhere has such scales, so that they stay exact.
    """

    bits: IntBits
    group_size: int | None
    symmetric: bool = True
    scale_dtype: ScaleName = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits not in _INT_BITS:
            raise QuantizationError(f"an integer format has 2 to 8 bits, not {self.bits!r}")
        size, unit = self.group_size, max(2, _whole_bytes(self.bits))
        if size is not None and (size < unit or size % unit):
            columns = "an even number" if unit == 2 else f"a multiple of {unit}"
            raise QuantizationError(
                f"group_size {size!r} is not possible with {self.bits} bits: take {columns} of "
                "columns, or None for one group a row"
            )

    @property
    def name(self) -> str:
        """Short name that ``parse_format`` reads back, such as ``int4-g32`` or ``int8-pc``."""
        groups = "pc" if self.group_size is None else f"g{self.group_size}"
        zero = "" if self.symmetric else "-asym"
        return f"int{self.bits}-{groups}{zero}" + ("-f16" if self.scale_dtype == "float16" else "")

    @property
    def implicit_zero_point(self) -> int:
        """The code that stands for zero when the format is symmetric: 8 for 4 bits."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code: 15 for 4 bits."""
        return (1 << self.bits) - 1

    def columns_per_group(self, cols: int) -> int:
        """Columns that share a scale in a matrix of ``cols`` columns."""
        return cols if self.group_size is None else self.group_size

    def groups(self, cols: int) -> int:
        """Number of groups in each row of a matrix of ``cols`` columns."""
        return 1 if self.group_size is None else cols // self.group_size

    def check(self, weight_name: str, rows: int, cols: int) -> None:
        """Refuse a matrix of a shape that this format cannot hold.

        Args:
            weight_name: Name to use in the message.
            rows: Output features.
            cols: Input features, the dimension that is grouped.

        Raises:
            QuantizationError: When the matrix is empty, the groups do not divide the columns, or
                the codes of a row do not fill whole bytes.
        """
        _check_size(weight_name, self.name, rows, cols)
        unit = _whole_bytes(self.bits)
        if cols % unit:
            needs = "an even number" if unit == 2 else f"a multiple of {unit}"
            raise FormatRefused(
                f"{weight_name} has {cols} input columns; {self.name} needs {needs}, because a "
                f"row's codes fill whole bytes",
                f"keep it {self._int8_advice()}",
            )
        size = self.group_size
        if size is not None and cols % size:
            fitting = _largest_divisor(cols, size, max(2, unit))
            use = "" if fitting is None else f"use group_size {fitting} or "
            raise FormatRefused(
                f"{weight_name} has {cols} input columns; {self.name} needs a multiple of "
                f"group_size {size}",
                f"{use}keep it {self._int8_advice()}",
            )

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        """Dtypes and shapes of the stored parts of a ``[rows, cols]`` matrix.

        ``codes`` is ``uint8[rows, cols * bits / 8]``. Each row is a stream of bits: the code of
        column ``c`` takes bits ``c * bits`` and up, its lowest bit first, and bit ``b`` of the
        stream is bit ``b % 8`` of byte ``b // 8`` (int4: low nibble = even column). ``scale`` is
        ``bfloat16[rows, groups]`` (or ``float16``). An asymmetric format adds ``zero_point``,
        ``uint8[rows, ceil(groups * bits / 8)]``: the zero points of a row's groups, packed alike.
        """
        groups = self.groups(cols)
        parts = {
            "codes": TensorLayout("uint8", (rows, cols * self.bits // 8)),
            "scale": TensorLayout(self.scale_dtype, (rows, groups)),
        }
        if not self.symmetric:
            parts["zero_point"] = TensorLayout("uint8", (rows, -(-groups * self.bits // 8)))
        return parts

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all stored parts of a ``[rows, cols]`` matrix."""
        return sum(part.nbytes for part in self.layout(rows, cols).values())

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits per weight, scales and zero points included.

        >>> IntFormat(4, 32).bits_per_weight(64, 128)
        4.5
        """
        return 8 * self.nbytes(rows, cols) / (rows * cols)

    def _int8_advice(self) -> str:
        return "fp16" if self.bits == 8 and self.group_size is None else "int8-pc"


@dataclass(frozen=True)
class PaletteFormat:
    """Codes that look values up in a sorted table of float16 numbers.

    The format of Core ML's ``constexpr_lut_to_dense`` with scalar entries.

    Attributes:
        bits: 2, 3, 4, 6 or 8; a table has ``2 ** bits`` entries.
        rows_per_group: Output rows that share a table ("per grouped channel"), or None for one
            table for the whole matrix ("per tensor").
    """

    bits: Literal[2, 3, 4, 6, 8]
    rows_per_group: int | None

    def __post_init__(self) -> None:
        if self.bits not in _PALETTE_BITS:
            raise QuantizationError(
                f"a palette format has 2, 3, 4, 6 or 8 bits, not {self.bits!r}; no runtime reads "
                "tables of other sizes"
            )
        if self.rows_per_group is not None and self.rows_per_group < 1:
            raise QuantizationError(
                f"rows_per_group {self.rows_per_group!r} is not possible: take one row or more, or "
                "None for one table for the whole matrix"
            )

    @property
    def name(self) -> str:
        """Short name that ``parse_format`` reads back, such as ``lut4-gc16`` or ``lut8-pt``."""
        rows = self.rows_per_group
        return f"lut{self.bits}-" + ("pt" if rows is None else f"gc{rows}")

    @property
    def entries(self) -> int:
        """Entries of one table: ``2 ** bits``."""
        return 1 << self.bits

    def groups(self, rows: int) -> int:
        """Number of tables of a matrix of ``rows`` rows."""
        return 1 if self.rows_per_group is None else rows // self.rows_per_group

    def check(self, weight_name: str, rows: int, cols: int) -> None:
        """Refuse a matrix of a shape that this format cannot hold.

        Args:
            weight_name: Name to use in the message.
            rows: Output features, the dimension that is grouped.
            cols: Input features.

        Raises:
            QuantizationError: When the matrix is empty, the groups do not divide the rows, or the
                codes of a row do not fill whole bytes.
        """
        _check_size(weight_name, self.name, rows, cols)
        group = self.rows_per_group
        if group is not None and rows % group:
            fitting = next(size for size in range(min(group, rows), 0, -1) if rows % size == 0)
            use = f"lut{self.bits}-gc{fitting}, or one table for all rows with lut{self.bits}-pt"
            raise FormatRefused(
                f"{weight_name} has {rows} output rows; {self.name} needs a multiple of {group}, "
                f"because that many rows share a table",
                f"use {use}",
            )
        columns = _whole_bytes(self.bits)
        if cols % columns:
            groups = self.name.partition("-")[2]
            others = [bits for bits in _PALETTE_BITS if cols * bits % 8 == 0]
            raise FormatRefused(
                f"{weight_name} has {cols} input columns; {self.name} needs a multiple of "
                f"{columns}, because a row's codes fill whole bytes",
                f"use {' or '.join(f'lut{bits}-{groups}' for bits in others)}, or keep it fp16",
            )

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        """Dtypes and shapes of the stored parts of a ``[rows, cols]`` matrix.

        ``codes`` is ``uint8[rows, cols * bits / 8]``. Each row is a stream of bits: the code of
        column ``c`` takes bits ``c * bits`` and up, its lowest bit first, and bit ``b`` of the
        stream is bit ``b % 8`` of byte ``b // 8`` (4 bits: low nibble = even column). ``lut`` is
        ``float16[groups, 2 ** bits]``, ascending in each table.
        """
        return {
            "codes": TensorLayout("uint8", (rows, cols * self.bits // 8)),
            "lut": TensorLayout("float16", (self.groups(rows), self.entries)),
        }

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all stored parts of a ``[rows, cols]`` matrix."""
        return sum(part.nbytes for part in self.layout(rows, cols).values())

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits per weight, tables included.

        >>> PaletteFormat(4, 16).bits_per_weight(64, 128)
        4.125
        """
        return 8 * self.nbytes(rows, cols) / (rows * cols)


@dataclass(frozen=True)
class FloatFormat:
    """Weights kept as floating-point values.

    Attributes:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """

    dtype: FloatName

    def __post_init__(self) -> None:
        if self.dtype not in _FLOAT_NAMES:
            raise QuantizationError(
                f"a float format is one of {', '.join(_FLOAT_NAMES)}, not {self.dtype!r}"
            )

    @property
    def name(self) -> str:
        """Short name that ``parse_format`` reads back: ``fp32``, ``fp16`` or ``bf16``."""
        return _FLOAT_NAMES[self.dtype]

    def check(self, weight_name: str, rows: int, cols: int) -> None:
        """Refuse an empty matrix.

        Raises:
            QuantizationError: When there is no row or no column.
        """
        _check_size(weight_name, self.name, rows, cols)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        """The one stored part of a ``[rows, cols]`` matrix: ``value``."""
        return {"value": TensorLayout(self.dtype, (rows, cols))}

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a ``[rows, cols]`` matrix."""
        return self.layout(rows, cols)["value"].nbytes

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes(rows, cols) / (rows * cols)


QuantizedFormat = IntFormat | PaletteFormat
WeightFormat = QuantizedFormat | FloatFormat


def parse_format(name: str) -> WeightFormat:
    """Returns the format that a name stands for.

    >>> parse_format("int4-g64-asym")
    IntFormat(bits=4, group_size=64, symmetric=False, scale_dtype='bfloat16')
    >>> parse_format("lut4-gc16")
    PaletteFormat(bits=4, rows_per_group=16)
    >>> parse_format("fp16").name
    'fp16'

    Raises:
        QuantizationError: When no format has the name; the message lists what is allowed.
    """
    for dtype, short in _FLOAT_NAMES.items():
        if name == short:
            return FloatFormat(dtype)
    match = _INT_NAME.fullmatch(name)
    if match is not None:
        size = None if match[3] is None else int(match[3])
        scale: ScaleName = "bfloat16" if match[5] is None else "float16"
        wide = next(bits for bits in _INT_BITS if bits == int(match[1]))
        return IntFormat(wide, size, match[4] is None, scale)
    match = _PALETTE_NAME.fullmatch(name)
    for bits in _PALETTE_BITS:
        if match is not None and int(match[1]) == bits:
            return PaletteFormat(bits, None if match[3] is None else int(match[3]))
    near = nearest(name, _USUAL_NAMES)
    meant = "" if near is None else f"; did you mean {near}?"
    raise QuantizationError(
        f"{name!r} is not a weight format: allowed are int2 to int8 with -g<group_size> or -pc "
        f"(per channel) and an optional -asym, such as int4-g32, int2-g64-asym and int8-pc; lut2, "
        f"lut3, lut4, lut6 and lut8 with -gc<rows that share a table> or -pt (per tensor), such as "
        f"lut4-gc16; and {', '.join(_FLOAT_NAMES.values())}{meant}"
    )


def _check_size(weight_name: str, format_name: str, rows: int, cols: int) -> None:
    if rows < 1 or cols < 1:
        raise QuantizationError(
            f"{weight_name} has shape [{rows}, {cols}]; {format_name} needs at least one row and "
            "one column"
        )


def _whole_bytes(bits: int) -> int:
    """The least number of codes that together fill whole bytes."""
    return 8 // math.gcd(bits, 8)


def _largest_divisor(cols: int, limit: int, unit: int) -> int | None:
    """The largest divisor of ``cols`` from 8 to ``limit`` that is a multiple of ``unit``."""
    for size in range(min(limit, cols), 7, -1):
        if size % unit == 0 and cols % size == 0:
            return size
    return None
