"""Weights as Core ML constants: integers with their scales, and floats.

The store's codes are unsigned; a symmetric format becomes Core ML's signed integers, whose bytes
are the store's with the sign bits flipped. The store's scales are bfloat16 and Core ML's float16,
which holds a bfloat16 exactly where it is a normal number: scales that are smaller are multiplied
by a power of two, and the product by its inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.blobs import SIGNED, SIGNED_NIBBLES, WIDENED, Blob, Conversion
from exporters.coreml.emitter import Emitter
from exporters.coreml.function import FileValue, Shape, Value
from exporters.coreml.names import identifier
from exporters.coreml.weight_file import WeightFile
from exporters.errors import ExportError
from quant.formats import IntFormat
from quant.store import Extent, WeightStore

# Ends the name of the constant that the product is multiplied by.
DESCALE: Final = "__descale"
_BLOCK: Final = 1 << 20
_BFLOAT16_BIAS, _HALF_BIAS = 127, 15
_HALF_EXPONENTS: Final = (-14, 15)  # of normal numbers


def scale_to_half(data: bytes, exponent: int) -> bytes:
    """bfloat16 times ``2 ** exponent`` as float16, exactly: `common_exponent` sees to that.

    >>> np.frombuffer(scale_to_half(bytes([0x80, 0x3F]), 3), np.float16).tolist()
    [8.0]
    """
    wide = np.frombuffer(data, np.uint16).astype(np.int32)
    shifted = ((wide & 0x7FFF) << 3) - (_BFLOAT16_BIAS - _HALF_BIAS - exponent << 10)
    half: npt.NDArray[np.int32] = np.where(wide & 0x7FFF, shifted, 0) | (wide & 0x8000)
    return half.astype(np.uint16).tobytes()


def scale_from_half(data: bytes, exponent: int) -> bytes:
    """Undoes `scale_to_half`; what is no scaled bfloat16 keeps its bits, so that it shows."""
    half = np.frombuffer(data, np.uint16).astype(np.int32)
    if (half & 7).any():
        return data
    shifted = (half & 0x7FFF) + (_BFLOAT16_BIAS - _HALF_BIAS - exponent << 10) >> 3
    wide: npt.NDArray[np.int32] = np.where(half & 0x7FFF, shifted, 0) | (half & 0x8000)
    return wide.astype(np.uint16).tobytes()


def scale_conversion(exponent: int) -> Conversion:
    """bfloat16 scales times a power of two as float16, and back."""
    return Conversion(
        partial(scale_to_half, exponent=exponent), partial(scale_from_half, exponent=exponent)
    )


def common_exponent(weight: str, extent: Extent) -> int:
    """The power of two nearest 0 that makes all scales of a weight normal float16 numbers.

    Raises:
        ExportError: there is none.
    """
    least, most = 0x7F80, 0
    for block in _blocks(extent):
        sizes = np.frombuffer(block, np.uint16) & np.uint16(0x7FFF)
        most = max(most, int(sizes.max()))
        least = min(least, int(np.where(sizes, sizes, np.uint16(0x7F80)).min()))
    if not most:
        return 0
    low, high = ((size >> 7) - _BFLOAT16_BIAS for size in (least, most))
    smallest, largest = _HALF_EXPONENTS[0] - low, _HALF_EXPONENTS[1] - high
    if smallest > largest:
        raise ExportError(
            f"{weight} has scales from 2^{low} to 2^{high}; Core ML's float16 scales span 30 "
            f"powers of two: keep it fp16"
        )
    return min(max(0, smallest), largest)


def _blocks(extent: Extent) -> Iterator[bytes]:
    with extent.file.open("rb") as stream:
        stream.seek(extent.offset)
        for start in range(0, extent.nbytes, _BLOCK):
            yield stream.read(min(_BLOCK, extent.nbytes - start))


@dataclass(frozen=True)
class Weight:
    """A weight in a function.

    Attributes:
        value: what operations read.
        descale: what their results are to be multiplied by; None for 1.
    """

    value: Value
    descale: Value | None = None


class WeightBank:
    """Weights of a store in the weight file, the same for every function.

    Args:
        store: the weights.
        file: where they go.
    """

    def __init__(self, store: WeightStore, file: WeightFile) -> None:
        self.store, self.file = store, file
        self._exponents: dict[str, int] = {}

    def integer(self, emitter: Emitter, weight: str, format: IntFormat, shape: Shape) -> Weight:
        """A matrix in integers, as float16.

        Args:
            emitter: the function.
            weight: its name.
            format: its format.
            shape: its rows and columns.
        """
        extents, name = self.store.extents(weight), identifier(weight)
        if weight not in self._exponents:
            self._exponents[weight] = common_exponent(weight, extents["scale"])
        exponent = self._exponents[weight]
        signed = SIGNED_NIBBLES if format.bits == 4 else SIGNED
        data = self._file_value(
            *(weight, "codes", f"{'' if format.symmetric else 'u'}int{format.bits}", shape),
            signed if format.symmetric else None,
        )
        groups = extents["scale"].shape
        scale = self._file_value(weight, "scale", "fp16", groups, scale_conversion(exponent))
        if emitter.opset == "CoreML7":
            value = self._affine(emitter, name, data, scale)
        else:
            parts = {"data": data, "scale": scale}
            if not format.symmetric:
                parts["offset"] = self._zero_point(weight, format, groups)
            value = emitter.constexpr("constexpr_blockwise_shift_scale", name, "fp16", shape, parts)
        if not exponent:
            return Weight(value)
        return Weight(value, emitter.named_scalar(name + DESCALE, 2.0**-exponent, "fp16"))

    def _affine(self, emitter: Emitter, name: str, data: FileValue, scale: FileValue) -> Value:
        """The form of iOS 16, of integers of 8 bits with a scale a row."""
        from exporters.coreml.function import array_value
        from exporters.coreml.schema import messages

        zero = messages()["Value"]()
        zero.type.tensorType.dataType = 21
        zero.immediateValue.tensor.bytes.values = b"\0"
        parts = {
            "quantized_data": data,
            "scale": FileValue("fp16", scale.shape[:1], scale.offset),
            "zero_point": zero,
            "axis": array_value("int32", np.asarray(0)),
        }
        return emitter.constexpr("constexpr_affine_dequantize", name, "fp16", data.shape, parts)

    def _zero_point(self, weight: str, format: IntFormat, groups: Shape) -> FileValue:
        """Zero points, one a group, without the store's padding at the end of each row."""
        extent = self.store.extents(weight)["zero_point"]
        dtype = f"uint{format.bits}"
        if format.bits == 8 or groups[1] % 2 == 0:
            return self._file_value(weight, "zero_point", dtype, groups, None)
        packed = np.frombuffer(b"".join(_blocks(extent)), np.uint8).reshape(extent.shape)
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(groups[0], -1)[:, : groups[1]]
        flat = np.append(codes.ravel(), np.zeros(codes.size % 2, np.uint8))
        blob = Blob((flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes())
        offset = self.file.place((weight, "zero_point"), dtype, codes.size, blob)
        return FileValue(dtype, groups, offset)

    def floating(self, emitter: Emitter, weight: str, shape: Shape) -> Value:
        """A weight that stays float: float16 as it is, others as float32, which loses nothing."""
        extent = self.store.extents(weight)["value"]
        dtype = "fp16" if extent.dtype == "F16" else "fp32"
        conversion = WIDENED if extent.dtype == "BF16" else None
        value = self._file_value(weight, "value", dtype, shape, conversion)
        return emitter.stored(identifier(weight), value)

    def table(self, emitter: Emitter, name: str, values: npt.NDArray[np.generic]) -> Value:
        """A constant that is no weight: float16 or float32."""
        dtype = {2: "fp16", 4: "fp32"}[values.itemsize]
        offset = self.file.place((name, dtype), dtype, values.size, Blob(values.tobytes()))
        return emitter.stored(name, FileValue(dtype, values.shape, offset))

    def _file_value(
        self, weight: str, part: str, dtype: str, shape: Shape, conversion: Conversion | None
    ) -> FileValue:
        extent = self.store.extents(weight)[part]
        count = int(np.prod(shape))
        offset = self.file.place((weight, part), dtype, count, Blob(extent, conversion))
        return FileValue(dtype, shape, offset)
